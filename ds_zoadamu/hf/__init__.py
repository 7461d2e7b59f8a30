"""Models of Transformers on partitions: loading and saving."""
