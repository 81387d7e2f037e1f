"""What lies at addresses (`s3://`, `gs://`, `hf://`, `https://`): asked for, and fetched once."""
