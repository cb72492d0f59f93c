"""Methods that train what another method made."""
