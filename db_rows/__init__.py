"""What db.py and db_security.py send and return, as types with every outcome; nothing is checked here."""
