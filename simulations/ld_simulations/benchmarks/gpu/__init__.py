"""What only a GPU shows: its arithmetic, speed and memory."""
