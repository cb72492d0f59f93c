"""Model families: names, shapes and forwards of decoder layers."""
