"""The small world the tiny model knows: tables of facts and words, English and Chinese.

Every table is a string that is easy to read and to extend: items are separated by ``;``, fields by a
space, and ``_`` stands for a space inside a field. ``FACTS[name]`` is a list of dictionaries, one an item.
"""

from __future__ import annotations


class Word(str):
    """A string with format codes: ``{x:C}`` capitalised, ``{x:a}`` with its article, ``{x:A}`` both.

    Example: ``"{x:A} hoots.".format(x=Word("owl"))`` -> ``"An owl hoots."``
    """

    def __format__(self, code: str) -> str:
        """Returns the word as ``code`` (``""``, ``C``, ``a`` or ``A``) asks for it."""
        text = str(self)
        if code in ("a", "A"):
            text = ("an " if text[0] in "aeiou" else "a ") + text
        return text[:1].upper() + text[1:] if code in ("C", "A") else text


def table(fields: str, rows: str) -> list[dict[str, Word]]:
    """Parses a table.

    Args:
        fields: the field names, separated by spaces.
        rows: the items, separated by ``;``.

    Returns:
        One dictionary an item, for example ``[{"country": "France", "capital": "Paris"}, ...]``.

    Raises:
        ValueError: if an item does not have one value a field.
    """
    names, items = fields.split(), []
    for row in filter(None, (part.strip() for part in rows.split(";"))):
        values = [Word(value.replace("_", " ")) for value in row.split()]
        if len(values) != len(names):
            raise ValueError(f"Item {row!r} has {len(values)} values; the fields are {names}. Use _ for a space.")
        items.append(dict(zip(names, values, strict=True)))
    return items


CAPITALS = table("country capital zh_country zh_capital", """
    France Paris 法国 巴黎; Japan Tokyo 日本 东京; Italy Rome 意大利 罗马; Spain Madrid 西班牙 马德里;
    Germany Berlin 德国 柏林; Egypt Cairo 埃及 开罗; Peru Lima 秘鲁 利马; Norway Oslo 挪威 奥斯陆;
    Poland Warsaw 波兰 华沙; Greece Athens 希腊 雅典; Portugal Lisbon 葡萄牙 里斯本; Austria Vienna 奥地利 维也纳;
    Canada Ottawa 加拿大 渥太华; Cuba Havana 古巴 哈瓦那; Kenya Nairobi 肯尼亚 内罗毕; Chile Santiago 智利 圣地亚哥;
    Hungary Budapest 匈牙利 布达佩斯; Sweden Stockholm 瑞典 斯德哥尔摩; Finland Helsinki 芬兰 赫尔辛基;
    Denmark Copenhagen 丹麦 哥本哈根; Ireland Dublin 爱尔兰 都柏林; Thailand Bangkok 泰国 曼谷; China Beijing 中国 北京;
    Nepal Kathmandu 尼泊尔 加德满都; Vietnam Hanoi 越南 河内; Belgium Brussels 比利时 布鲁塞尔; Turkey Ankara 土耳其 安卡拉;
    Australia Canberra 澳大利亚 堪培拉; Argentina Buenos_Aires 阿根廷 布宜诺斯艾利斯; India New_Delhi 印度 新德里""")

OPPOSITES_EN = table("word other", """
    hot cold; big small; fast slow; high low; happy sad; rich poor; open closed; early late; full empty; wet dry;
    day night; black white; strong weak; long short; left right; inside outside; heavy light; clean dirty; thick thin;
    near far; true false; front back; first last; deep shallow; wide narrow; loud quiet; safe dangerous;
    cheap expensive; north south; east west; easy difficult; up down; love hate; win lose; buy sell; push pull;
    begin end; question answer; asleep awake; summer winter""")

OPPOSITES_ZH = table("word other", """
    大 小; 多 少; 长 短; 上 下; 左 右; 前 后; 快 慢; 冷 热; 黑 白; 早 晚; 新 旧; 轻 重; 胖 瘦; 远 近; 开 关; 进 出;
    买 卖; 深 浅; 粗 细; 厚 薄; 干 湿; 宽 窄; 软 硬; 真 假; 里 外; 哭 笑; 来 去; 输 赢; 高 低; 安全 危险; 成功 失败;
    简单 复杂; 高兴 难过; 干净 肮脏; 开始 结束; 白天 黑夜""")

YOUNG = table("animal young", """
    cat kitten; dog puppy; cow calf; sheep lamb; horse foal; duck duckling; hen chick; lion cub; goat kid; deer fawn;
    pig piglet; kangaroo joey; frog tadpole; goose gosling; swan cygnet; owl owlet; eagle eaglet""")

COLOURS_EN = table("thing colour", """
    snow white; grass green; coal black; blood red; milk white; chocolate brown; a_lemon yellow; a_carrot orange;
    an_elephant grey; a_flamingo pink; a_frog green; a_strawberry red; a_banana yellow; a_crow black;
    a_polar_bear white;
    a_cucumber green; a_cherry red; a_sunflower yellow; a_swan white; a_pumpkin orange""")

COLOURS_ZH = table("thing colour", """
    雪 白色; 草 绿色; 煤 黑色; 血 红色; 香蕉 黄色; 天空 蓝色; 胡萝卜 橙色; 茄子 紫色; 巧克力 棕色; 大象 灰色; 牛奶 白色;
    乌鸦 黑色; 草莓 红色; 黄瓜 绿色; 向日葵 黄色; 南瓜 橙色; 大海 蓝色; 樱桃 红色""")

PLURALS = table("one many", """
    child children; foot feet; tooth teeth; mouse mice; man men; woman women; goose geese; box boxes; baby babies;
    leaf leaves; knife knives; wolf wolves; city cities; bus buses; potato potatoes; ox oxen; story stories;
    dish dishes; brush brushes; party parties; fox foxes; tomato tomatoes; shelf shelves; lady ladies""")

TOOLS = table("purpose tool", """
    cut_paper scissors; tell_the_time a_clock; open_a_lock a_key; sweep_the_floor a_broom; write_a_letter a_pen;
    hit_a_nail a_hammer; clean_our_teeth a_toothbrush; eat_soup a_spoon; keep_off_the_rain an_umbrella;
    look_at_the_stars a_telescope; dig_a_hole a_spade; take_a_photo a_camera; draw_a_straight_line a_ruler;
    measure_a_fever a_thermometer; find_the_north a_compass; boil_water a_kettle; dry_our_hands a_towel;
    light_a_dark_room a_lamp""")

JOBS = table("person place", """
    teacher in_a_school; doctor in_a_hospital; cook in_a_kitchen; sailor on_a_ship; judge in_a_court;
    actor in_a_theatre;
    pilot on_a_plane; farmer on_a_farm; librarian in_a_library; scientist in_a_laboratory; baker in_a_bakery;
    painter in_a_studio; gardener in_a_garden; waiter in_a_restaurant; miner in_a_mine; barber in_a_barbershop""")

HOMES = table("animal home", """
    bee hive; bird nest; spider web; dog kennel; horse stable; lion den; rabbit burrow; hen coop; pig sty; ant anthill;
    bear cave; cow barn""")

MEASURES_ZH = table("noun measure", """
    马 匹; 书 本; 汽车 辆; 花 朵; 鱼 条; 树 棵; 纸 张; 铅笔 支; 雨伞 把; 衣服 件; 牛 头; 猫 只; 飞机 架; 船 艘; 电脑 台;
    画 幅; 信 封; 歌 首; 裤子 条; 鞋 双; 帽子 顶; 镜子 面; 星星 颗; 桥 座; 灯 盏; 椅子 把; 桌子 张; 苹果 个; 诗 首; 河 条;
    鸡 只; 山 座; 电影 部; 自行车 辆""")

NOUNS = table("en zh", """
    apple 苹果; book 书; water 水; fire 火; mountain 山; river 河; sun 太阳; moon 月亮; star 星星; tree 树; flower 花;
    fish 鱼; bird 鸟; cat 猫; dog 狗; horse 马; cow 牛; house 房子; door 门; window 窗户; table 桌子; chair 椅子; bread 面包;
    milk 牛奶; tea 茶; rice 米饭; egg 鸡蛋; school 学校; teacher 老师; student 学生; friend 朋友; mother 妈妈; father 爸爸;
    train 火车; plane 飞机; ship 船; car 汽车; city 城市; road 路; rain 雨; snow 雪; wind 风; hand 手; eye 眼睛; ear 耳朵;
    mouth 嘴; head 头; heart 心; music 音乐; movie 电影""")

DAYS_EN = table("now next", "Monday Tuesday; Tuesday Wednesday; Wednesday Thursday; Thursday Friday; Friday Saturday; "
                            "Saturday Sunday; Sunday Monday")
MONTHS_EN = table("now next", """
    January February; February March; March April; April May; May June; June July; July August; August September;
    September October; October November; November December; December January""")
DAYS_ZH = table("now next", "星期一 星期二; 星期二 星期三; 星期三 星期四; 星期四 星期五; 星期五 星期六; 星期六 星期日; 星期日 星期一")

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_HAN = "零一二三四五六七八九"


def number_en(n: int) -> str:
    """Returns a number from 0 to 99 in English words: ``47`` -> ``"forty-seven"``."""
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def number_zh(n: int) -> str:
    """Returns a number from 0 to 99 in Chinese characters: ``47`` -> ``"四十七"``."""
    if n < 10:
        return _HAN[n]
    return (_HAN[n // 10] if n >= 20 else "") + "十" + (_HAN[n % 10] if n % 10 else "")


def _numbers(spell) -> list[dict[str, Word]]:
    """Returns the items of a table of the numbers 0 to 99 and their names."""
    return [{"n": Word(n), "name": Word(spell(n))} for n in range(100)]


def _sums(kind: str) -> list[dict[str, Word]]:
    """Returns the items (a, b, c) of one table of arithmetic: ``add``, ``sub`` or ``mul``."""
    if kind == "mul":
        triples = [(a, b, a * b) for a in range(2, 10) for b in range(2, 10)]
    else:
        triples = [(a, b, a + b) for a in range(1, 11) for b in range(1, 11)]
        if kind == "sub":
            triples = [(c, a, b) for a, b, c in triples]
    return [{"a": Word(a), "b": Word(b), "c": Word(c)} for a, b, c in triples]


FACTS: dict[str, list[dict[str, Word]]] = {
    "capital_en": CAPITALS, "capital_zh": CAPITALS, "opposite_en": OPPOSITES_EN, "opposite_zh": OPPOSITES_ZH,
    "young_en": YOUNG, "colour_en": COLOURS_EN, "colour_zh": COLOURS_ZH, "plural_en": PLURALS, "tool_en": TOOLS,
    "job_en": JOBS, "home_en": HOMES, "measure_zh": MEASURES_ZH, "word_en": NOUNS, "word_zh": NOUNS,
    "day_en": DAYS_EN, "month_en": MONTHS_EN, "day_zh": DAYS_ZH,
    "number_en": _numbers(number_en), "number_zh": _numbers(number_zh),
    "add_en": _sums("add"), "sub_en": _sums("sub"), "mul_en": _sums("mul"),
    "add_zh": _sums("add"), "sub_zh": _sums("sub"), "mul_zh": _sums("mul"),
}
