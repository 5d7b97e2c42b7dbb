"""The steps that modes share: start, finish, lineage of runs, comparison, inspection."""
