"""What `import retinaray` offers to notebooks and programs; every command is one function."""
