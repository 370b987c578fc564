"""An application as anybody would write it who knows Feast and has never heard of Moveline.

It is a program of its own: `python app_recommender.py REPOSITORY USER`. What it found it prints as
one line of JSON. Nothing of Moveline is imported; the repository's folder is all it is told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
from feast import FeatureStore


def main(repository: str, user: int) -> dict[str, Any]:
    """Read, push and look back."""
    store = FeatureStore(repo_path=repository)
    asked = [{"user_id": user}, {"user_id": 404}]
    gems = store.get_feature_service("gems")
    online = store.get_online_features(features=gems, entity_rows=asked).to_dict()
    refs = ["user_session:session_num_events", "user_recent:recent_item_id"]
    awaited = asyncio.run(store.get_online_features_async(features=refs, entity_rows=asked))
    items = online["recent_item_id"][0]

    now = datetime.now(tz=UTC)
    pushed = pd.DataFrame(
        {
            "item_id": [items[-1]],
            "item_events_1d": [3],
            "item_events_7d": [20],
            "event_timestamp": [now],
        }
    )
    store.push("item_statistics_push", pushed)
    older = pushed.assign(item_events_1d=[1], event_timestamp=[now - timedelta(hours=1)])
    store.push("item_statistics_push", older)
    statistics = store.get_online_features(
        features=["item_statistics:item_events_1d", "item_statistics:item_events_7d"],
        entity_rows=[{"item_id": item} for item in (items[-1], 404)],
    ).to_dict()

    labels = pd.DataFrame({"item_id": [7, 7], "event_timestamp": [now - timedelta(days=2), now]})
    history = store.get_historical_features(
        entity_df=labels, features=["item_statistics:item_events_7d"]
    ).to_df()
    return {
        "online": online,
        "awaited": awaited.to_dict(),
        "statistics": statistics,
        "history": history.sort_values("event_timestamp")["item_events_7d"].tolist(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]))) + "\n")
