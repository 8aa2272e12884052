"""Between the weights of public releases and our models."""
