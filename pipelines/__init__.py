"""What happens to a run: manifests, networks, losses, metrics, training, inference, and the command line over them."""
