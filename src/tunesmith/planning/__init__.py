"""What a run needs of memory and time, told before it starts."""
