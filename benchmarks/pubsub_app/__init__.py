"""A Django application that uses django-pgpubsub as its documentation shows it."""
