"""What is refused, in one list: the rules of options, of a launch, of arguments, and of a run.

Each is a generator of refusals over what is known by then, and changes nothing; `refusals.refuse` tells all that were
found together.
"""
