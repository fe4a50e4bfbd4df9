"""Published implementations run beside ours: how they are installed, called and counted."""
