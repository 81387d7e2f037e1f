"""The run folder: its names, who may write it, what it has recorded, and which tuned model it holds."""
