"""Images: EDM's U-Net, published networks, data sets, scores."""
