"""The product, without HTTP routes: left imports right: proxy < runtime < billing < pricing, upstream,
webhooks.
"""
