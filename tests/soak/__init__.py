"""Long runs that look for faults by chance; each is a command, and pytest does not collect them."""
