"""What the commands share: options, output, exit codes.

Knows nothing of any one command.
"""
