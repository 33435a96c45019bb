"""The edge agent: it pre-trains on one device, contributes, and uses the model that comes back."""
