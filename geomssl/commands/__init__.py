"""What each command does: settings from flags, then one call into the core, the probes or the reports."""
