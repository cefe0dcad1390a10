"""What a task is, and its rows: from any source to Parquet files, and from there to tokens."""
