"""One page: the orders as they are."""

from django.http import HttpRequest, HttpResponse
from django.urls import path

from shop.models import Order


def orders(request: HttpRequest) -> HttpResponse:
    """A line for each order."""
    lines = [f"{each.id} {each.customer} {each.status}" for each in Order.objects.order_by("id")]
    return HttpResponse("\n".join(lines), content_type="text/plain")


urlpatterns = [path("", orders)]
