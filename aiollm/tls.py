"""HTTPS by Python's own ssl: what the certificate is, who may come, and how a new one takes the place of the old."""

import ssl


def made(certfile: str, keyfile: str, ca_certs: str) -> ssl.SSLContext | None:
    """What connections are encrypted by, TLS 1.2 or newer; None without a certificate.

    `ca_certs` are the issuers of clients' certificates, and without a file no client needs one. Raises ValueError that
    names the flag.
    """
    if not certfile:
        for flag, path in (("--ssl_keyfile", keyfile), ("--ssl_ca_certs", ca_certs)):
            if path:
                raise ValueError(f"{flag} {path} needs --ssl_certfile beside it")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    load(context, certfile, keyfile)
    if ca_certs:
        _look("--ssl_ca_certs", ca_certs)
        try:
            context.load_verify_locations(ca_certs)
        except ssl.SSLError as error:
            raise ValueError(f"--ssl_ca_certs {ca_certs}: there is no certificate in PEM form") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    """Show the certificate in these files to connections that are made from now on.

    Raises ValueError that names the flag; a context that has one already may then show one half of it: try the files
    on another one before.
    """

    def password() -> str:
        raise ValueError(f"--ssl_keyfile {keyfile or certfile}: the key has a password, which nobody is there to type")

    _look("--ssl_certfile", certfile)
    _look("--ssl_keyfile", keyfile or certfile)
    try:
        context.load_cert_chain(certfile, keyfile or None, password)
    except ssl.SSLError as error:
        beside = f", --ssl_keyfile {keyfile}" if keyfile else ""
        mismatch = error.reason == "KEY_VALUES_MISMATCH"
        reason = "the key is another certificate's" if mismatch else "there is no certificate and its key in PEM form"
        raise ValueError(f"--ssl_certfile {certfile}{beside}: {reason}") from error


def _look(flag: str, path: str) -> None:
    try:
        open(path, "rb").close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error
