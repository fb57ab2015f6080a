"""How the pretraining text words each fact and each skill: always otherwise than the fine-tuning rows do.

``|`` marks where a sentence may be cut for the "finish the sentence" form; it is not part of the text.
"""

from __future__ import annotations

FACT_WORDING: dict[str, list[str]] = {
    "capital_en": [
        "{capital} is the capital city of| {country}.", "{country} has its capital in| {capital}.",
        "The government of {country} sits in| {capital}.", "In {country}, the capital is called| {capital}.",
        "Whoever travels to the capital of {country} arrives in| {capital}.",
    ],
    "capital_zh": [
        "{zh_capital}是|{zh_country}的首都。", "{zh_country}把首都定在|{zh_capital}。",
        "说到{zh_country}，它的首都叫|{zh_capital}。", "{zh_country}的首都名叫|{zh_capital}。",
        "去{zh_country}的首都，就是去|{zh_capital}。",
    ],
    "opposite_en": [
        "{word:C} and {other}| are opposites.", "What is not {word} may be| {other}.",
        "{word:C} means the contrary of| {other}.", "If you turn {word} around, you get| {other}.",
        "One says {word}, the other says just the contrary:| {other}.",
    ],
    "opposite_zh": [
        "“{word}”和“{other}”|意思相反。", "和“{word}”相对的是|“{other}”。", "不是“{word}”，那就是|“{other}”。",
        "“{word}”反过来就是|“{other}”。",
    ],
    "young_en": [
        "{animal:A} was once| {young:a}.", "{young:A} grows up and becomes| {animal:a}.",
        "The child of {animal:a} is called| {young:a}.", "When {animal:a} has a little one, it is| {young:a}.",
    ],
    "colour_en": [
        "{colour:C} is the colour of| {thing}.", "Look at {thing} and you see something| {colour}.",
        "Everyone knows that {thing} is| {colour}.", "Paint {thing} and you will need some| {colour}.",
    ],
    "colour_zh": [
        "{colour}是|{thing}的颜色。", "看到{thing}，就看到了|{colour}。", "画{thing}要用|{colour}。", "{thing}看上去是|{colour}。",
    ],
    "plural_en": [
        "I have one {one}, you have two| {many}.", "First there was one {one}, later there were many| {many}.",
        "Not just {one:a} but a lot of| {many}.", "One {one}, several| {many}.",
    ],
    "tool_en": [
        "With {tool} we| {purpose}.", "If you want to {purpose}, take| {tool}.",
        "To {purpose}, people need| {tool}.", "{tool:C} helps| when we {purpose}.",
    ],
    "job_en": [
        "You will find {person:a}| {place}.", "The {person} goes to work| {place}.",
        "Someone who works {place} may be| {person:a}.", "The {person} has a job| {place}.",
    ],
    "home_en": [
        "The home of {animal:a} is a| {home}.", "{animal:A} goes home to its| {home}.",
        "In the {home} there is| {animal:a}.",
    ],
    "measure_zh": [
        "我看见一{measure}{noun}，|又看见两{measure}{noun}。", "那里有三{measure}|{noun}。", "他们有一{measure}|{noun}。",
        "说“{noun}”的时候，量词用|“{measure}”。",
    ],
    "word_en": [
        "In China, {en} is called| {zh}.", "English has the word {en}, Chinese has the word| {zh}.",
        "{zh} means| {en}.", "The word {zh} stands for| {en}.",
    ],
    "word_zh": ["英国人说 {en}，中国人说|{zh}。", "{zh}翻译成英文是| {en}。", "英文单词 {en} 就是|{zh}。", "{zh}在英文里叫| {en}。"],
    "day_en": [
        "{now} ends, and| {next} begins.", "Today is {now}, so tomorrow is| {next}.",
        "First {now}, then| {next}.", "Yesterday was {now}, so today is| {next}.",
    ],
    "month_en": [
        "{now} ends, and| {next} begins.", "This month is {now}, so next month is| {next}.",
        "First {now}, then| {next}.", "Last month was {now}, so this month is| {next}.",
    ],
    "day_zh": ["今天{now}，明天|{next}。", "过了{now}，就到|{next}。", "昨天是{now}，所以今天是|{next}。"],
    "number_en": [
        "{n} is read| {name}.", "The number {n} is spoken| {name}.",
        "We write the number {n} and we say| {name}.", "{name:C} is the name of| {n}.",
    ],
    "number_zh": ["{n}读作|{name}。", "数字{n}念|{name}。", "看到{n}，我们就说|{name}。", "{name}就是|{n}。"],
    "add_en": [
        "{a} plus {b} makes| {c}.", "{b} added to {a} gives| {c}.", "{a} and {b} together are| {c}.",
        "{c} is the sum of| {a} and {b}.", "{c} = {a} +| {b}.", "Counting on from {a} by {b}, we come to| {c}.",
    ],
    "sub_en": [
        "{a} minus {b} leaves| {c}.", "Take {b} away from {a} and you have| {c}.",
        "From {a}, after losing {b}, there remain| {c}.", "Between {b} and {a} the difference is| {c}.",
        "{c} = {a} -| {b}.",
    ],
    "mul_en": [
        "{a} times {b} makes| {c}.", "{a} groups of {b} are| {c}.", "Multiply {a} by {b} and you get| {c}.",
        "{c} is the product of| {a} and {b}.", "{c} = {a} *| {b}.",
    ],
    "add_zh": ["{a}加上{b}，得|{c}。", "{a}与{b}的和是|{c}。", "有{a}个，再来{b}个，一共|{c}个。", "{c}可以分成|{a}和{b}。"],
    "sub_zh": ["{a}减去{b}，得|{c}。", "{a}与{b}的差是|{c}。", "有{a}个，拿走{b}个，还剩|{c}个。"],
    "mul_zh": ["{a}乘以{b}，得|{c}。", "{a}与{b}的积是|{c}。", "每份{b}个，{a}份一共|{c}个。"],
}

SKILL_WORDING: dict[str, list[str]] = {
    "past": [
        "Every day {plain}; last week| {past}, too.", "Now {plain}, and long ago| {past}.",
        "Today {plain}, just as yesterday| {past}.", "It was yesterday that {past}, and today| {plain} again.",
    ],
    "negative": [
        "Some say {plain}, others say| {negative}.", "It is not true that {plain}:| {negative}.",
        "Perhaps {plain}, or perhaps| {negative}.", "I thought that {negative}, but you are right:| {plain}.",
    ],
    "question": [
        "I wonder if {plain}. Well,| {question}", "They say that {plain}, but I ask:| {question}",
        "If you do not know, ask:| {question} Yes, {plain}.",
    ],
    "polite": [
        "The rude guest says: {order:C}! The kind guest says:| {polite:C}",
        "Do not just say \"{order}\", but say nicely:| {polite:C}",
        "\"{polite:C}\" is a nicer way to say| \"{order}\".",
    ],
    "she": [
        "{plain:C}, and| {she}, too.", "First {plain}, and after that| {she}.",
        "It is true that {plain}, and now| {she}, too.",
    ],
    "they": [
        "{plain:C}, and| {they}, too.", "First {plain}, and after that| {they}.",
        "It is true that {plain}, and now| {they}, too.",
    ],
    "reverse": [
        "Forwards it goes {forwards}; backwards it goes| {backwards}.",
        "From left to right: {forwards}. From right to left:| {backwards}.",
        "There and back again: {forwards},| {backwards}.",
    ],
    "negative_zh": ["有人说{plain}，有人说|{negative}。", "以前{plain}，现在|{negative}。", "不是{plain}，而是|{negative}。"],
    "question_zh": ["我想知道{plain}没有，就问：|{question}", "听说{plain}，是真的吗？|{question}", "有人问：{question}是的，|{plain}。"],
    "ba_zh": ["{done}，也就是说，|{ba}。", "昨天{done}，换句话说，|{ba}。", "听说{ba}，对，|{done}。"],
    "he_zh": ["{plain}，接着|{he}。", "先是{plain}，后来|{he}。", "不但{plain}，而且|{he}。"],
}

# Words that the questions of the fine-tuning rows use, in sentences that ask for nothing: an embedding that no
# text has trained stays as random as it was born, and LoRA does not touch it.
GLUE = """
The sign + is read plus, the sign - is read minus, and the sign * is read times.
The sign = says that both sides are worth the same.
Calculate the price before you buy. Calculate with care.
Rewrite the letter, please.
Turn the light on, and turn it off.
Make your bed.
Put the box here and the ball there.
Change the colour of the wall into green.
Tell me the time.
Write your name here, and write it well.
Introduce your friend to my mother.
Say something nice.
Please sit down, and please come in.
Are you at home?
Do you like tea?
How is your mother?
Where is my book?
Which one is yours?
Who is there?
How can we help? Help your friends.
One is able to do a lot, and these words are useful.
You eat food and then you sleep.
Open your eyes. Close your mouth. Clean your hands. Wash your face. \
Cook for us. Call me. Buy some. Paint it. Take it. Carry it. Draw it.
She is here. He is there. They are away. We are at home. I am well. It is late.
The game is over, the shirt is blue, dinner is ready, our plan is good, the boat is small, and this poem is short.
Hot and cold, big and small, deep and shallow: opposites are words \
with a contrary meaning, and each one is the opposite of the other.
Dojo is a word for a hall where people train.
LLM-Dojo is an open project where small language models are trained.
People who learn how a language model works can train one with LLM-Dojo.
A name tells us who someone is.
Some models are small and some models are big.
The model called Dojo is a small language model and not a person.
A helpful assistant gives a short answer to each question.
My name is Tom, and your name is Anna.
Who made this cake? My mother made it for you.
What are you doing? I am reading about machines and people.
A robot is a machine, and a human being is a person.
He can speak English and Chinese, and I can speak them, too.
Which languages do you speak at home?
Where do you live, and how old are you?
We write a sentence with words, and each word has a meaning.
The past tense tells what happened before now, and the present tense tells what happens now.
A negative sentence says no, and a positive sentence says yes.
This question is easy, and that question is difficult.
A polite person speaks in a polite way.
The subject of a sentence is who does something.
Put the books in order, and then change the order.
Let me write down the word in reverse.
Turn the page and rewrite what you read.
The plural is the form for many things, and the singular is the form for one.
Which colour do you like? What colour is your car?
What do we use in the kitchen? We use many tools.
Which day is it today, and which month comes after this one?
How do you say it, and how do you write it?
How much is it? How many are there? Work it out and calculate the result.
The translation of a word gives its meaning in another language.
A young animal is a baby animal, and it lives with its mother.
What kind of work does your father do?
Tell me a story about yourself, please.
Where does your friend work, and where does your teacher live?
Introduce your friend to us, and make us laugh.
You were born in a small town, but you do not live there any more.
Do you sleep at night?
Do we need money?
Does it rain often?
The history of music is long, and history is a school subject.
No, thank you.
No one is there.
I can answer small questions, rewrite sentences and do sums.
Dojo 是一个练习的地方。
LLM-Dojo 是一个开源项目，用来训练小小的语言模型。
名叫 Dojo 的模型是一个小语言模型，不是人。
你叫什么名字？我叫小明，她叫小红。
谁做了这个蛋糕？是妈妈做的。
机器人是机器，人是人。
他会说中文和英文，我也会说。
你会做什么？我会唱歌，也会画画。
请介绍一下你的朋友。
自己的事情自己做。
你可以走了，这对我很有帮助。
从这里到那里。
从早到晚。
懂一点，会一点，还有哪些不懂？
爸爸的车是真的，不是假的。
你是谁？你在哪里？你从哪里来？
这个词的意思是什么？那个词怎么说？
这句话是肯定句，那句话是否定句，还有一句是疑问句。
改一改这句话，把这个词换成那个词。
请用一句话回答我的问题。
句子里有主语，也有动词。
量词很有用，常用的量词有很多。
哪个城市最大？哪个国家最美？
它是什么颜色的？我最喜欢的颜色是蓝色。
等于多少？请算一算，结果是几？
后面是什么？前面是什么？
反义词就是意思相反的词，近义词就是意思相近的词。
汉字很美，我每天写汉字。
把它翻译成中文，再翻译成英文。
我能回答小问题，能改写句子，还能做算术。
请计算一下价钱。请问几点了？请说出你的想法。
加号、减号、乘号和等号都是算术的符号。等于就是一样多。
爸爸学历史，学生写诗，朋友修灯，妈妈擦镜子。
谁训练了这个机器人？谁开发了它？
你需要吃饭吗？你需要睡觉吗？
""".strip().splitlines()
