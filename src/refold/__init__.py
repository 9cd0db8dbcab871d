"""Convolutional networks that train with many branches and run with one."""
