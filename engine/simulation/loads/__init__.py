"""Where loads come from: traces, generators, earlier reports; how they are written, and scaled. No engine, no costs."""
