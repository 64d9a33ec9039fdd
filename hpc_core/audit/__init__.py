"""What ran is what the case asks for: facts from the live module and from watched steps, never from the configuration."""
