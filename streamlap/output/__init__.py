"""What an output folder holds beside its shards, and how it is looked at afterwards."""
