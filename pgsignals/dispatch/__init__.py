"""From a message to receivers: registry, queues, workers, calls, retries and brokers."""
