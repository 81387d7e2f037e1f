"""What people look at: the data before a run, the live view, the loss curve, the table at the end."""
