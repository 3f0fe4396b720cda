"""What goes wrong, done to real worker processes; after each fault the same oracle is asked (`oracle`)."""
