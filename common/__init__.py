"""The small package that the notebooks of the course import. Data flows one way through it; see
README.md.
"""
