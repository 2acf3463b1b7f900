"""The `dsv3` command. One small file per subcommand: it reads flags, calls the library, shows the result."""
