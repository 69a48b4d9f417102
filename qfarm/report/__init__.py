"""Report: what a store holds, as tables to read (render), as data for programs (data), or one cell whole (show)."""
