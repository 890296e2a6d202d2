"""Trainings that a kill only interrupts: the folder of one, and the state that it goes on from."""
