"""The bench's model: scenes, counter, text encoder, trained weights."""
