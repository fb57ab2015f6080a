"""Sentences to rewrite: small clauses, English and Chinese, in every form the rewriting rows ask for.

The last object of each verb is kept for the fine-tuning rows, and the pretraining text is made of the others, so
that no rewriting row can be known by heart before tuning.
"""

from __future__ import annotations

import random

from data.build.world import NOUNS, Word, table

SUBJECTS_EN = table("subject third", """
    I no; you no; we no; they no; he yes; she yes; Tom yes; Anna yes; my_father yes; the_teacher yes; the_children no;
    my_friends no""")
VERBS_EN = table("base third past objects", """
    open opens opened the_door|the_window|the_box; close closes closed the_door|the_window|the_book;
    clean cleans cleaned the_room|the_kitchen|the_table; wash washes washed the_dishes|the_car|the_shirt;
    paint paints painted the_wall|the_fence|the_chair; cook cooks cooked rice|soup|dinner;
    watch watches watched a_film|the_birds|the_game; visit visits visited the_museum|a_friend|the_old_town;
    call calls called a_friend|the_doctor|the_school; buy buys bought bread|milk|a_book;
    eat eats ate an_apple|bread|soup; drink drinks drank tea|milk|water; write writes wrote a_letter|a_story|a_poem;
    see sees saw the_moon|a_bird|the_river;
    sing sings sang a_song|an_old_song; make makes made tea|a_cake|a_plan; find finds found a_key|the_book|the_road;
    take takes took the_bus|a_photo|the_train; sell sells sold flowers|apples|the_car;
    build builds built a_house|a_boat;
    draw draws drew a_tree|a_cat|a_horse; carry carries carried the_bag|the_box; study studies studied music|history""")
SUBJECTS_ZH = ["我", "你", "他", "她", "我们", "他们", "妈妈", "爸爸", "老师", "小明", "小红", "朋友"]
VERBS_ZH = table("verb objects", """
    吃 苹果|鸡蛋|面包|米饭; 喝 茶|牛奶|水; 看 书|电影|画; 听 音乐|歌; 买 书|花|鞋|衣服; 卖 花|鱼|船; 洗 衣服|裤子|汽车|鞋;
    写 信|诗; 画 马|山|花; 关 门|窗户|电脑|灯; 学 音乐|数学|历史; 擦 桌子|窗户|椅子|镜子; 修 自行车|电脑|桥|灯""")
BA_VERBS = "吃喝洗关擦修卖"  # verbs whose object goes naturally before them, after 把
POLITE_VERBS = ("open", "close", "clean", "wash", "paint", "cook", "call", "buy", "write", "make", "take",
                "carry", "draw")


def _pairs(verbs: list[dict[str, Word]], field: str, kept: bool) -> list[tuple[dict[str, Word], str]]:
    """Returns (verb, object) pairs: those kept for the fine-tuning rows, or those left for pretraining."""
    pairs = []
    for verb in verbs:
        objects = verb[field].split("|")
        pairs += [(verb, thing) for thing in (objects[-1:] if kept else objects[:-1])]
    return pairs


def clauses_en(kept: bool) -> list[dict[str, Word]]:
    """Returns the English clauses in all their forms, without capital letter or full stop.

    Example: ``plain`` "Tom opens the door", ``past`` "Tom opened the door", ``negative`` "Tom does not open the
    door", ``question`` "does Tom open the door?", ``she`` "she opens the door", ``they`` "they open the door".

    Args:
        kept: True for the clauses of the fine-tuning rows, False for those of the pretraining text.
    """
    found = []
    for verb, thing in _pairs(VERBS_EN, "objects", kept):
        for subject in SUBJECTS_EN:
            who, base, third = subject["subject"], verb["base"], verb["third"]
            do, now = ("does", third) if subject["third"] == "yes" else ("do", base)
            forms = {
                "who": who, "plain": f"{who} {now} {thing}", "past": f"{who} {verb['past']} {thing}",
                "negative": f"{who} {do} not {base} {thing}", "question": f"{do} {who} {base} {thing}?",
                "she": f"she {third} {thing}", "they": f"they {base} {thing}",
            }
            found.append({key: Word(value) for key, value in forms.items()})
    return found


def orders_en(kept: bool) -> list[dict[str, Word]]:
    """Returns orders and their polite form: ``order`` "open the door", ``polite`` "could you please open the door?"."""
    found = []
    for verb, thing in _pairs(VERBS_EN, "objects", kept):
        if verb["base"] in POLITE_VERBS:
            order = f"{verb['base']} {thing}"
            found.append({"order": Word(order), "polite": Word(f"could you please {order}?")})
    return found


def clauses_zh(kept: bool) -> list[dict[str, Word]]:
    """Returns the Chinese clauses in all their forms, without full stop.

    Example: ``plain`` 我喝茶, ``negative`` 我不喝茶, ``question`` 我喝茶吗？, ``he`` 他喝茶, ``done`` 我喝了茶, ``ba``
    我把茶喝了 (empty where 把 does not go with the verb).

    Args:
        kept: True for the clauses of the fine-tuning rows, False for those of the pretraining text.
    """
    found = []
    for row, thing in _pairs(VERBS_ZH, "objects", kept):
        for who in SUBJECTS_ZH:
            verb = row["verb"]
            forms = {
                "who": who, "plain": f"{who}{verb}{thing}", "negative": f"{who}不{verb}{thing}",
                "question": f"{who}{verb}{thing}吗？", "he": f"他{verb}{thing}", "done": f"{who}{verb}了{thing}",
                "ba": f"{who}把{thing}{verb}了" if verb in BA_VERBS else "",
            }
            found.append({key: Word(value) for key, value in forms.items()})
    return found


def word_lists(n: int, rng: random.Random) -> list[dict[str, Word]]:
    """Returns ``n`` lists of three different nouns: ``forwards`` "cat, dog, fish", ``backwards`` "fish, dog, cat"."""
    found = []
    for _ in range(n):
        words = [item["en"] for item in rng.sample(NOUNS, 3)]
        found.append({"forwards": Word(", ".join(words)), "backwards": Word(", ".join(reversed(words)))})
    return found
