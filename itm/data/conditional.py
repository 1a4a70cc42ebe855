"""Writing to S3 on a condition, which pyarrow cannot: for leases. It needs boto3 (the extra `s3`)."""

from __future__ import annotations

import os
from typing import Any

from itm.data.patience import asked
from itm.data.remote import place_of, store_of

_LOST = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409", "NoSuchKey")


def put_if(uri: str, data: bytes, instead: bytes | None) -> bool | None:
    """Write an object where there is none, or, with `instead`, where there is one of that content; whether it was written.

    None where that cannot be asked for: no boto3, or a store that does not know conditions. Raises OSError as other writing does.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import ClientError
    except ImportError:
        return None
    bucket, endpoint = place_of(uri)
    key = uri.removeprefix(f"s3://{bucket}/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if endpoint else None)
    config = Config(
        connect_timeout=3, retries={"mode": "standard", "max_attempts": 2}, s3={"addressing_style": "path" if endpoint else "auto"}
    )
    door: Any = boto3.client("s3", endpoint_url=endpoint, region_name=region, config=config)

    def put() -> bool | None:
        condition = {"IfNoneMatch": "*"}
        try:
            if instead is not None:
                held = door.get_object(Bucket=bucket, Key=key)
                if held["Body"].read() != instead:
                    return False
                condition = {"IfMatch": held["ETag"]}
            door.put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            if code in _LOST:
                return False
            if code in ("NotImplemented", "501", "InvalidArgument"):
                return None
            raise OSError(f"cannot write {uri}: {error}") from None
        return True

    return asked(put, uri, store_of(uri))
