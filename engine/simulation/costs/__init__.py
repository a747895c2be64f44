"""Where costs come from: measured steps and fits to them, profiles on file, published peaks. Nothing is simulated."""
