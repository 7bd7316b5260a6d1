"""For a web server. With LISTEN=1 the process that serves also listens."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
application = get_wsgi_application()

if os.environ.get("LISTEN"):
    import pgsignals.contrib.django

    pgsignals.contrib.django.start()
