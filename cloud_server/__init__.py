"""The cloud server: it collects, has averaged and fine-tuned, and publishes."""
