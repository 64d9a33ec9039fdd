"""What no hardware can pass: the least work and bytes of a case in closed form, compared with data sheets. Imports no torch."""
