"""What a model costs on a cluster, told before anything is bought: schedules, memory, time, money."""
