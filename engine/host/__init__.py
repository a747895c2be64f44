"""What an engine takes from its host besides devices: threads, whole files, the terminal, optional packages."""
