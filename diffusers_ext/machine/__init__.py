"""What this machine offers: versions, devices and backends, and a check of each way of running a pipeline."""
