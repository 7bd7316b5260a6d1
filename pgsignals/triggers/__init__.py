"""From a watcher to SQL: tables, trigger functions, their installation and inspection."""
