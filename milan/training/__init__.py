"""How anything is trained: the loop, optimizers and schedules, devices and precision, weights, resume."""
