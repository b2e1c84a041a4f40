"""Choose a threshold by measuring: plant copies of the user's own images and see what is found."""
