"""What happens when: compress, survey, evaluate, export and resume, each a loop over decoder layers."""
