"""Check that what ran is what the case asks for. Facts come from the live module and from observed steps, never from configuration."""
