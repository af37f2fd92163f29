"""How the demo models were made: stories, tokenizer, three models, evaluation.

    python demo/train.py            everything, about 80 minutes on two CPU cores
    python demo/train.py draft      train only the small model that drafts for demo/llama, then evaluate
    python demo/train.py stories    print a few stories and what the checker says of them
    python demo/train.py eval       evaluate the saved models again and rewrite README.md

Small models can only learn a small world, so this file brings its own.  A table of events is read
both ways: a writer picks events, fills their sentences and changes the state of the world; a checker
finds the event behind each sentence of a text, tests what the event needs and changes its own state
of the world in the same way.  So the training text is consistent by construction, and whether a
model's story is consistent is not a matter of taste: the checker says yes, or names the sentence
that fails and the reason.

Needed: torch, safetensors and tiktoken.  The models are written out here in plain PyTorch; the three
folders that come out, demo/llama, demo/gpt2 and demo/draft, have the layout and the names of Hugging
Face.  From the engine there is only sampling.py, because how well one model drafts for another is a
question of the noise that they share.
"""

import functools
import json
import multiprocessing
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import regex
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from sampling import SamplingParams, noise_key, sample

# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------
PEOPLE = dict.fromkeys("Lily Anna Mia Rosa".split(), "she") | \
         dict.fromkeys("Tom Ben Max Sam".split(), "he")
ANIMALS = dict.fromkeys("the cat,the hen,the mouse,the rabbit".split(","), "she") | \
          dict.fromkeys("the dog,the fox,the bear,the duck".split(","), "he")
PRONOUN = PEOPLE | ANIMALS
FORMS = {"he": {"he": "he", "him": "him", "his": "his"}, "she": {"he": "she", "him": "her", "his": "her"}}
TRAITS = "kind brave clever gentle cheerful merry".split()
SKILLS = "swim,sing,dance,whistle,read,draw,play the flute".split(",")
COLOURS = "red blue green yellow white black".split()
THINGS = "ball kite hat doll book drum cup boat bell scarf coat blanket".split()
FOOD = {"apple": "apples", "pear": "pears", "plum": "plums", "nut": "nuts", "berry": "berries", "bun": "buns"}
PLURAL = FOOD | {"egg": "eggs", "shell": "shells", "stone": "stones", "flower": "flowers"}
WARM = ("scarf", "coat", "blanket")
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()
SEATS = ["on the mat", "by the fire", "by the window", "on the step", "in the sun", "by the door"]
SPOTS = {  # every place, and where something or someone can be there
    "home": ["under the bed", "behind the door", "on the shelf", "in the box", "under the table"],
    "the garden": ["under the bush", "behind the shed", "near the gate", "among the roses"],
    "the park": ["under the bench", "behind the tree", "near the swing", "in the tall grass"],
    "the forest": ["under the leaves", "behind the tree", "in the hollow log", "near the old oak"],
    "the river": ["under the bridge", "in the reeds", "behind the big rock", "near the water"],
    "the farm": ["in the barn", "behind the fence", "under the cart", "in the hay"],
    "the beach": ["in the sand", "behind the big rock", "near the water", "in the old boat"],
    "the hill": ["in the tall grass", "behind the big rock", "under the bush", "near the old oak"],
    "the market": ["in the basket", "under the cart", "behind the wall", "near the well"]}

# ---------------------------------------------------------------------------------------------
# Events: "name slots : needs -> effects", and below it the sentences that tell it
#
# Slots: A B C somebody, X Y a thing, P a place, S R a spot there, F what is counted, K M N numbers,
# T a trait, V a skill, W a seat; "+" marks one that is new to the story.  Needs and effects are
# Python over the tables of the world (at, holder, count ...).  A slot that neither the plot nor the
# sentence gives is found through a need of the form "N == ...".  In a sentence, {A} may become a
# pronoun; what follows the dot asks for another form: A.n the name, A.a "a kind girl named Lily",
# A.o as an object, A.v as called by others, A.he A.him A.his always the pronoun, X.c with its
# colour, F.N agreeing with the number N, N.list "One, two, three", P.to "to the park" or "home".
# ---------------------------------------------------------------------------------------------
EVENTS = '''
there_was +A : -> at[A] = "home"
  Once upon a time there was {A.a}. | Once upon a time, there lived {A.a} in a small house.
  Once upon a time there was {A.a} who loved to play. | There was once {A.a}. | There once lived {A.a}.
went_out +A P : P != "home" -> at[A] = P
  One day, {A.n} walked {P.to}. | One morning, {A.n} went {P.to}. | One sunny day, {A.n} ran {P.to}.
  {A.n} went {P.to} one fine morning. | One day {A.n} was {P.at}.
sat +A W : -> at[A] = "home"
  {A.n} sat {W}. | {A.n} sat {W} and looked around. | One day, {A.n} sat {W}. | {A.n} sat {W} all morning.
was +A T : A in PEOPLE -> at[A] = "home"; trait[A] = T
  {A.n} was a {T} {A.kind}. | {A.n} was a {T} {A.kind} who lived in a small house.
woke +A : -> at[A] = "home"
  {A.n} woke up early. | {A.n} woke up and looked out of the window. | One morning, {A.n} woke up early.
two_friends +A +B : -> at[A] = at[B] = "home"
  {A.n} and {B.n} were good friends. | {A.n} and {B.n} lived in the same house.
  Once upon a time there were two friends, {A.n} and {B.n}.
  Once upon a time, {A.n} and {B.n} lived in a small house.
two_went +A +B P : P != "home" -> at[A] = at[B] = P
  One day, {A.n} and {B.n} went {P.to}. | {A.n} and {B.n} walked {P.to} one morning.
  {A.n} and {B.n} were {P.at}. | One sunny day, {A.n} and {B.n} ran {P.to}.
sky : not flag["sky"] -> flag["sky"] = True
  The sun was shining. | It was a warm day. | Birds were singing. | The sky was blue and clear. | It was spring.
content A : mood[A] is None -> mood[A] = "happy"
  {A} was warm and happy. | {A} felt very happy. | {A} was in a good mood. | {A} hummed a little song.
lonely A : not trouble -> trouble[A] = "lonely"
  But {A} was lonely. | {A} was all alone and wanted a friend. | {A} had nobody to play with.
  "I wish I had a friend," said {A}.
meet A +B : -> trouble.pop(A, 0)
  Then {A} met {B.a}. | Soon {B.a} came along and sat down next to {A.o}.
  Just then {B.a} came by and looked at {A.o}. | {A} looked up and saw {B.a}.
friend A +B : -> trouble.pop(A, 0)
  Soon {A} saw {A.his} friend {B.n}. | Then {A} met {A.his} friend {B.n}.
  Then {A.his} friend {B.n} came to see {A.n}.
greet A B : not flag[A, B] -> flag[A, B] = True
  "Hello, {A.v}!" said {B}. "Let us be friends." | "Good morning, {A.v}," said {B}.
  "Hello!" said {A}. "Hello!" said {B}.
  "Will you play with me?" asked {A}. "Yes, I will," said {B}.
suggest A B P : P != at[A]; not plan -> plan["to"] = P
  "Let us go {P.to}," said {A} to {B.o}. | "Shall we go {P.to}?" asked {A}. "Yes!" said {B}.
  {A} asked {B.o} to come along {P.to}.
go A B P : P != at[A]; plan["to"] in (None, P) -> at[A] = at[B] = P; plan.clear()
  {AB} walked {P.to}. | {AB} went {P.to} together. | So {AB} ran {P.to}.
  {AB} set off and soon they were {P.at}.
own A +X : -> holder[X] = owner[X] = A
  {A} had a {X.c}. | {A} had a new {X.c} that {A.he} loved. | {A} had brought a {X.c}.
  {A} was very proud of {A.his} {X.c}.
  {A} showed everyone {A.his} {X.c}. | "Look at my {X.c}!" said {A}.
play A X : holder[X] == A; trouble[X] != "broken" -> flag[A, X] = True
  {A} liked the {X} very much. | {A} held the {X} with care. | {A} was happy with the {X}.
  {A} carried the {X} around.
lose A X : holder[X] == A -> del holder[X]; lost[X] = A; trouble[X] = "lost"; topic["lost"] = X
  But then the {X} was gone. {A} did not know where it was. | Then {A} looked around, and the {X} was gone!
  A little later {A} could not find the {X}. | Oh no! {A} had lost the {X}.
sad A X : lost[X] == A -> mood[A] = "sad"
  {A} was sad because the {X} was lost. | {A} began to cry. {A.he} wanted the {X} back.
  {A} missed the {X} and felt very sad.
why B A X : mood[A] == "sad"; lost[X] == A -> flag["why"] = True
  "Why are you sad?" asked {B}. "I lost my {X}," said {A}.
  "What is wrong, {A.v}?" asked {B}. "My {X} is gone," said {A}.
saw A B X S : lost[X] == A; S in SPOTS[at[A]] -> clue[X] = S; owe[A] = B
  "Where is my {X}?" asked {A}. "It is {S}," said {B}.
  "Have you seen my {X}?" asked {A}. "I saw it {S}," said {B}.
  {A} asked {B.o} about the {X}. "Look {S}," said {B}.
far A B X P : lost[X] == A; P != at[A]; not plan -> plan["to"] = far[X] = P; owe[A] = B
  "Where is my {X}?" asked {A}. "I think it is {P.at}," said {B}.
  "Have you seen my {X}?" asked {A}. "I saw it {P.at}," said {B}.
help B A X : lost[X] == A -> owe[A] = B
  "I will help you, {A.v}," said {B}. "We will find the {X}." | {B} wanted to help {A.o} look for the {X}.
miss A R X : X == topic["lost"]; lost[X] == A; R in SPOTS[at[A]]; R != clue[X]; not flag[R, X]
-> flag[R, X] = True
  {A} looked {R}, but it was not there. | First {A} looked {R}. It was not there.
  {A} looked {R}, but there was nothing.
find A X S : lost[X] == A; S in SPOTS[at[A]]; clue[X] in (None, S); far[X] in (None, at[A]); not flag[S, X]
-> holder[X] = A; del lost[X]; trouble.pop(X); mood[A] = "happy"
  {A} looked {S}, and there was the {X.c}! | Then {A} looked {S} and found the {X}.
  There it was! The {X.c} was {S}, and {A} picked it up.
glad A : not trouble[A]; mood[A] != "sad" -> mood[A] = "happy"
  {A} was very happy. | How happy {A} was! | {A} jumped for joy. | {A} smiled.
thank A B : owe[A] == B -> owe.pop(A)
  "Thank you, {B.v}!" said {A}. | "Thank you so much!" said {A}. "You are welcome," said {B}.
  {A} thanked {B.o}.
have A N F : N > 1; count[A, F] is None -> count[A, F] = N; topic["F"] = F
  {A} had {N} {F.N}. | {A} had a bag with {N} {F.N} in it. | {A} had brought {N} {F.N}. | {A} found {N} {F.N}.
count_up A N F : F == topic["F"]; N == count[A, F] -> flag["list"] = True
  "{N.list}," counted {A}. | {A} counted them. "{N.list}," {A.he} said.
how_many B A N F : F == topic["F"]; N == count[A, F] -> flag["asked"] = True
  "How many {F.many} do you have?" asked {B}. "I have {N}," said {A}.
give_n A B K F : F == topic["F"]; 0 < K < count[A, F]
-> count[A, F] -= K; count[B, F] = (count[B, F] or 0) + K; owe[B] = A
  {A} gave {K} to {B.o}. | {A} gave {K} of them to {B.o}. | {A} gave {K} {F.K} to {B.o}.
  "You can have {K}," said {A} to {B.o}.
both A B N M F : F == topic["F"]; N == count[A, F]; M == count[B, F] ->
  Now {A} had {N} {F.N} and {B.n} had {M} {F.M}. | Then {A} had {N} {F.N}, and {B.n} had {M} {F.M}.
total A B N F : F == topic["F"]; N == (count[A, F] or 0) + (count[B, F] or 0) ->
  Together {AB} had {N} {F.N}. | "We have {N} {F.N} together," said {A} to {B.o}.
more A K N F : F == topic["F"]; N == count[A, F] + K; N < 13 -> count[A, F] = N
  Then {A} found {K} more, and now {A.he} had {N} {F.N}. | {A} found {K} more {F.K}. That made {N}.
eat_one A N F : F == topic["F"]; F in FOOD; N == count[A, F] - 1; N > 0 -> count[A, F] = N
  {A} ate one of them, and then {A.he} had {N} {F.N}. | {A} ate one {F.one}. Now {A.he} had {N} {F.N}.
hungry A : not trouble -> trouble[A] = "hungry"
  But {A} was hungry. | Then {A} was very hungry. | "I am so hungry," said {A}.
  {A} had not eaten all day and was hungry.
eat_up A F : F == topic["F"]; trouble[A] == "hungry"; F in FOOD; count[A, F] == 1
-> count[A, F] = 0; trouble.pop(A)
  {A} ate the {F.one} and was not hungry any more.
  {A} ate the {F.one} at once. It was very good, and {A.he} was full.
cake A M N F : F == "egg"; F == topic["F"]; M == count[A, F]; M < N < 11; not trouble
-> trouble[A] = "cake"; goal[A] = N
  "I need {N} eggs to bake a cake," said {A}. "I have only {M}."
  {A} wanted to bake a cake. For the cake {A.he} needed {N} eggs, but {A.he} had only {M}.
lay B A K : K == goal[A] - count[A, "egg"]; K > 0 -> count[A, "egg"] += K; owe[A] = B
  "I can give you {K} more," said {B}, and {A} was glad. | {B} had {K} more and gave them to {A.o}.
bake A B N : trouble[A] == "cake"; N == goal[A]; N == count[A, "egg"] -> trouble.pop(A); count[A, "egg"] = 0
  Now {A} had {N} eggs and baked a big cake. {B.n} had a big piece.
  With {N} eggs {A} made a fine cake, and {B.n} liked it very much.
may A B X : holder[X] == owner[X] == B; not trouble -> ask[X] = A
  "May I have your {X} for a while?" asked {A}. "Yes, you may," said {B}.
  "I like your {X}," said {A}. "You may hold it," said {B}.
lend B A X : holder[X] == B; ask[X] == A -> holder[X] = A; trouble[X] = "lent"; del ask[X]
  {B} gave the {X} to {A.o}. | So {B} gave {A.o} the {X}. | {B} handed {A.o} the {X}.
back A B X : trouble[X] == "lent"; holder[X] == A; owner[X] == B -> holder[X] = B; trouble.pop(X)
  Then {A} gave the {X} back to {B.o}. | After a while {A} gave {B.o} the {X} back.
  "Here is your {X}," said {A} and gave it back to {B.o}.
break A X : holder[X] == A; owner[X] != A -> trouble[X] = "broken"; mood[A] = "sad"
  But {A} dropped the {X}, and it broke. | Then {A} fell, and the {X} broke. | Crack! {A} had broken the {X}.
sorry A B X : trouble[X] == "broken"; mood[A] == "sad"; B == owner[X] -> flag["sorry"] = True
  "I am sorry that I broke your {X}," said {A}. | "Your {X} is broken. I am so sorry," said {A} to {B.o}.
mend A B X : trouble[X] == "broken"; owner[X] == B -> trouble.pop(X); holder[X] = B; mood[A] = "happy"
  "Do not be sad, {A.v}," said {B}. "We can mend it." They worked together, and soon {B.n} had the {X} back, as good as new.
  {B} was not angry. {AB} mended the {X} together, and {B.n} got it back.
gift A B X : holder[X] == owner[X] == A; not trouble[X] -> holder[X] = owner[X] = B; owe[B] = A
  {A} gave {A.his} {X} to {B.o}. "It is yours now," {A.he} said. | "This {X} is for you, {B.v}," said {A}.
swap A B X Y : holder[X] == owner[X] == A; holder[Y] == owner[Y] == B; not trouble
-> holder[X] = owner[X] = B; holder[Y] = owner[Y] = A
  "Let us swap," said {A}. So {B.n} took the {X}, and {A.n} took the {Y}.
  {A} gave the {X.c} to {B.n}, and {B.n} gave the {Y.c} to {A.n}.
held A B X Y : holder[X] == A; holder[Y] == B; X != Y ->
  Now {A} had the {X.c} and {B.n} had the {Y.c}. | Now the {X.c} was with {A.n} and the {Y.c} was with {B.n}.
game A B : not trouble; not flag["game"] -> flag["game"] = True
  "Let us play hide and seek," said {A} to {B.o}. | {AB} played hide and seek.
  "Can you find me, {B.v}?" asked {A}.
close B N : N > 2 ->
  {B} closed {B.his} eyes and counted to {N}. | {B} closed {B.his} eyes. "{N.list}," {B.he} counted.
hide A S : S in SPOTS[at[A]]; flag["game"]; not trouble
-> hiding[A] = S; trouble[A] = "hiding"; topic["hider"] = A
  {A} hid {S}. | {A} ran and hid {S}. | {A} found a good place {S}.
seek_no B A R : A == topic["hider"]; hiding[A] != R; hiding[A]; R in SPOTS[at[A]]; not flag[R, A]
-> flag[R, A] = True
  {B} looked {R}, but nobody was there. | {B} looked {R}. Nobody!
seek B A S : hiding[A] == S -> del hiding[A]; trouble.pop(A)
  Then {B} looked {S} and found {A.o}. | {B} looked {S}, and there was {A.n}!
  "There you are, {A.v}, {S}!" said {B}.
laugh A B :  "sad" not in (mood[A], mood[B]) ->
  {AB} laughed. | {AB} laughed and laughed. | {AB} had a lot of fun.
wind A X : holder[X] == A; at[A] != "home"
-> del holder[X]; trouble[X] = "stuck"; topic["stuck"] = X; stuck[X] = A
  Then the wind took the {X} from {A.o} and blew it into a tall tree.
  A strong wind blew the {X} out of {A.n}'s hands. It was stuck in a tree.
reach A X : X == topic["stuck"]; stuck[X] == A -> mood[A] = "sad"
  {A} jumped, but {A.he} could not reach it. | {A} could not get it down and was sad.
  "It is too high for me," said {A}.
climb B A X : stuck[X] == A -> del stuck[X]; holder[X] = A; trouble.pop(X); owe[A] = B; mood[A] = "happy"
  {B} climbed up, got the {X} down and gave it to {A.o}.
  {B} shook the tree until the {X} fell down, and {A.n} had it again.
rain : not trouble -> trouble["sky"] = "rain"
  Then it began to rain. | Dark clouds came, and it began to rain. | Drip, drop, it began to rain.
wet A : trouble["sky"] -> trouble[A] = "cold"
  {A} was wet and cold. | "I am cold," said {A}. | {A} got very wet and cold.
warm A +X : X in WARM -> holder[X] = owner[X] = A
  {A} had a warm {X.c}. | {A} had a thick {X.c} with {A.him}.
wrap B A X : trouble[A] == "cold"; holder[X] == B; X in WARM
-> trouble.pop(A); owe[A] = B
  {B} put the {X} around {A.o}. Soon {A.he} was warm.
  "Come under my {X}, {A.v}," said {B}. Soon {A} was warm again.
fire A B : at[A] == "home"; trouble[A] == "cold" -> trouble.pop(A)
  {AB} sat by the fire, and {A.n} was soon warm and dry. | {B} made a fire, and {A} was warm again.
dry : trouble["sky"] == "rain" -> trouble.pop("sky")
  Soon the rain stopped, and the sun came out. | At last it stopped raining. | Then the rain was over.
stash A X S P : P == at[A]; holder[X] == A; S in SPOTS[P]
-> del holder[X]; stash[X] = S; room[X] = P; trouble[X] = "hidden"
  {A} put the {X} {S} to keep it safe. | {A} hid the {X} {S}. | {A} left the {X} {S}.
recall B A X S : S == stash[X] ->
  "Where is the {X} now?" asked {B}. "It is {S}," said {A}.
  "Where did you put your {X}?" asked {B}. "I put it {S}," said {A}.
fetch A X S : S == stash[X]; at[A] == room[X] -> del stash[X]; holder[X] = A; trouble.pop(X)
  The {X} was still {S}, and {A} took it. | {A} looked {S} and took out the {X.c}.
  {A} went to get the {X}. It was still {S}.
wish A V : not trouble -> trouble[A] = "learn"; wish[A] = V
  {A} wanted to learn to {V}. | "I wish I could {V}," said {A}.
  {A} could not {V} and was a little sad about it.
teach B A V : wish[A] == V -> flag["taught", A] = True; owe[A] = B
  "I can teach you to {V}, {A.v}," said {B}. | {B} could {V} very well and showed {A.o} how.
  "It is not hard to {V}, {A.v}," said {B}. "Watch me."
try A : flag["taught", A]; wish[A] ->
  {A} tried, but it was hard. | {A} tried again and again. | {A} tried once. {A.he} tried twice.
can A V : wish[A] == V; flag["taught", A] -> trouble.pop(A); skill[A] = V; del wish[A]
  At last {A} could {V}! | In the end {A} could {V} too. | And then, all at once, {A} could {V}.
noise A S : S in SPOTS[at[A]]; not trouble -> trouble["noise"] = S
  Then {A} heard a strange noise. It came from something {S}.
  Something {S} made a strange noise, and {A} was afraid.
only B +C S : C in ANIMALS; trouble["noise"] == S -> trouble.pop("noise"); at[C] = at[B]
  {B} looked {S}. It was only {C.a}! | {B} was not afraid and looked {S}. There sat {C.a}!
praise B A T : trait[A]; T == trait[A] ->
  "You are so {T}, {A.v}," said {B}. | "What a {T} {A.kind} you are, {A.v}!" said {B}.
proud A V : skill[A]; V == skill[A] ->
  {A} was proud because now {A.he} could {V}. | "Now I can {V}!" said {A}.
evening A B : at[A] != "home"; not trouble -> at[A] = at[B] = "home"
  In the evening {AB} went home. | When the sun went down, {AB} walked home. | It was late, and {AB} went home.
dream A X : holder[X] == owner[X] == A; at[A] == "home"; not trouble ->
  That night {A} dreamed of the {X.c}. | At night {A} put the {X.c} next to {A.his} bed.
last A B : not trouble; "sad" not in mood.values() -> flag["ended"] = True
  {AB} were friends ever after. | From that day on {AB} were the best of friends.
  {AB} were happy, and it had been a good day.
  What a good day it had been for {A.n} and {B.n}! | So {AB} were happy, and all was well.
the_end : flag["ended"] -> flag["ended"] = True
  The end.
'''

PLOTS = '''
own A X; play A X?; lose A X; sad A X?; why B A X?; saw A B X S; miss A R X?; find A X S; glad A?; thank A B
own A X; play A X?; lose A X; sad A X; why B A X?; help B A X; miss A R X; miss A R X?; find A X S; glad A?; thank A B?
own A X; lose A X; sad A X?; far A B X P; go A B P; miss A R X?; find A X S; glad A?; thank A B
have A N F; count_up A N F?; give_n A B K F; both A B N M F; thank B A?; total A B N F?
have A N F; how_many B A N F?; give_n A B K F; thank B A?; both A B N M F; more A K N F; both A B N M F?
have A N F; more A K N F; count_up A N F?; give_n A B K F; thank B A?; both A B N M F
have A N F; eat_one A N F; give_n A B K F; both A B N M F; thank B A?
hungry A; have B N F; give_n B A 1 F; thank A B?; eat_up A F; glad A?
have A M egg; cake A M N egg; lay B A K; thank A B?; bake A B N; laugh A B?
own B X; may A B X; lend B A X; play A X?; back A B X; thank A B?
own B X; may A B X; lend B A X; play A X?; break A X; sorry A B X; mend A B X; laugh A B?
own A X; own B Y; swap A B X Y; held B A X Y; laugh A B?
own A X; play A X?; gift A B X; thank B A; glad B?
game A B; close B N; hide A S; seek_no B A R?; seek_no B A R?; seek B A S; laugh A B
own A X; suggest A B P?; go A B P?; wind A X; reach A X; climb B A X; thank A B; glad A?
warm B X; rain; wet A; wrap B A X; thank A B; dry
rain; wet A; go A B home; fire A B; dry
own A X; stash A X S P; ...; go A B P?; recall B A X S?; fetch A X S; glad A?
wish A V; teach B A V; try A; try A?; can A V; proud A V?; thank A B
noise A S; only B C S; laugh A B; greet A C?
suggest A B P; go A B P; ...
'''

# ---------------------------------------------------------------------------------------------
# Reading the table of events
# ---------------------------------------------------------------------------------------------
def cap(text):
    return text[0].upper() + text[1:]


def kind_of(name):
    return name[4:] if name in ANIMALS else {"he": "boy", "she": "girl"}[PEOPLE[name]]


def described(name, trait):
    return f"a {trait} {kind_of(name)}" + ("" if name in ANIMALS else f" named {name}")


def to_place(place):
    return "home" if place == "home" else f"to {place}"


def at_place(place):
    return {"the garden": "in ", "the forest": "in ", "the hill": "on "}.get(place, "at ") + place


def count_list(n):
    return cap(", ".join(NUMBERS[1:n + 1]))


def surfaces(letter, style):
    """All texts that a slot can show, each with the value that it stands for."""
    if letter == "AB":
        return {"they": "they"} | {f"{a} and {b}": (a, b) for a in PRONOUN for b in PRONOUN if a != b}
    if letter in tuple("ABC"):
        names = {name: name for name in PRONOUN}
        return {"": names | {"he": "he", "she": "she"}, "o": names | {"him": "he", "her": "she"}, "n": names,
                "v": {name.removeprefix("the "): name for name in PRONOUN},
                "a": {described(name, trait): name for name in PRONOUN for trait in TRAITS},
                "kind": dict.fromkeys(map(kind_of, PRONOUN)), "he": dict.fromkeys(("he", "she")),
                "him": dict.fromkeys(("him", "her")), "his": dict.fromkeys(("his", "her"))}[style]
    if letter in "XY":
        return {f"{c} {x}": x for x in THINGS for c in COLOURS} if style == "c" else {x: x for x in THINGS}
    if letter == "P":
        return {to_place(p) if style == "to" else at_place(p): p for p in SPOTS}
    if letter == "F":
        return {"one": {f: f for f in PLURAL}, "many": {PLURAL[f]: f for f in PLURAL}}.get(
            style, {f: f for f in PLURAL} | {PLURAL[f]: f for f in PLURAL})
    if letter in "KMN":
        return {count_list(n): n for n in range(2, 13)} if style == "list" else {w: n for n, w in enumerate(NUMBERS)}
    words = {"S": sum(SPOTS.values(), []), "R": sum(SPOTS.values(), []), "W": SEATS, "T": TRAITS, "V": SKILLS}
    return {word: word for word in words[letter]}


class Sentence:
    """One wording of an event: its slots, and a regular expression that finds it in a text."""

    def __init__(self, wording):
        wording = re.sub(r"(said|asked|counted) \{(\w)\}", r"\1 {\2.n}", wording)  # not: said he
        pieces = re.split(r"\{(\w+)\.?(\w*)\}", wording)  # text, slot, style, text, slot, style, ... text
        self.texts, self.slots, pattern = pieces[0::3], [], re.escape(pieces[0])
        for text, letter, style, after in zip(pieces[0::3], pieces[1::3], pieces[2::3], pieces[3::3]):
            starts = not self.slots and not text or text.endswith((". ", "! ", "? "))
            values = {cap(t) if starts else t: value for t, value in surfaces(letter, style).items()}
            self.slots.append((letter, style, starts, values))
            pattern += "(" + "|".join(sorted(map(re.escape, values), key=len, reverse=True)) + ")" + re.escape(after)
        self.regex = re.compile(pattern + r"(?P<gap> (?=\S)|\n\n(?=\S)|$)")


class Event:
    def __init__(self, block):
        head, wordings = block.split("\n  ", 1)
        signature, needs, effects = re.fullmatch(r"(.*?) :(.*)->(.*)", head, re.DOTALL).groups()
        self.name, *args = signature.split()
        self.args = [arg.lstrip("+") for arg in args]
        self.new = {arg[1] for arg in args if arg[0] == "+"}
        needs = [need.strip() for need in needs.split(";") if need.strip()]
        self.needs = [(need, compile(need, self.name, "eval")) for need in needs]
        self.given_by = {need[0]: compile(need[5:], self.name, "eval")  # slots that the world can fill
                         for need in needs if re.match("[A-Z] == ", need)}
        self.effects = compile(effects.strip(), self.name, "exec")
        self.sentences = [Sentence(wording.strip()) for wording in re.split(r"\n| \| ", wordings)]


EVENT = {event.name: event for event in map(Event, re.split(r"\n(?=\w)", EVENTS.strip()))}
PLOT = [line.split("; ") for line in PLOTS.strip().split("\n")]


# ---------------------------------------------------------------------------------------------
# The world, which the writer and the checker change by the same rules
# ---------------------------------------------------------------------------------------------
class Wrong(Exception):
    pass


class Facts(dict):
    def __missing__(self, key):
        return None


def check(truth, reason):
    if not truth:
        raise Wrong(reason)


class World:
    """Tables of facts, such as holder["ball"] == "Lily", and whom the pronouns mean."""

    TABLES = ("at holder owner colour trait mood count trouble lost clue far plan owe topic flag ask goal "
              "hiding stuck stash room wish skill").split()

    def __init__(self):
        self.facts = {name: Facts() for name in self.TABLES}
        self.scope = globals() | self.facts  # what needs and effects can see, besides the slots
        self.new_paragraph()

    def new_paragraph(self):
        self.focus = {"he": None, "she": None}  # who a pronoun means
        self.they = None

    def value(self, code, slots):
        try:
            return eval(code, self.scope, slots)
        except (NameError, TypeError):  # a slot is open, or a number was never told
            return None

    def complete(self, event, slots):
        """Fill the slots that follow from the state of the world."""
        for letter in event.args:
            if letter not in slots and letter in event.given_by:
                slots[letter] = self.value(event.given_by[letter], slots)

    def test(self, event, slots):
        """Raise Wrong unless the event can happen now."""
        at, colour = self.facts["at"], self.facts["colour"]
        check(not self.facts["flag"]["ended"] or event.name == "the_end", "the story goes on after its end")
        people = [slots[a] for a in event.args if a in "ABC"]
        check(len(set(people)) == len(people), "one character in two roles")
        for letter in event.args:
            if letter in "ABCXY":
                known = slots[letter] in (at if letter in "ABC" else colour)
                check(known or letter in event.new, f"{slots[letter]} was never introduced")
                check(not known or letter not in event.new, f"{slots[letter]} is already in the story")
        check(len({at[name] for name in people if name in at}) <= 1, f"{' and '.join(people)} are not in one place")
        for need, code in event.needs:
            check(self.value(code, slots), f"{event.name} needs {need}, with {slots}")

    def happen(self, event, slots, mentioned):
        """Let the event change the world; its sentence mentions some of the people."""
        people = [slots[a] for a in event.args if a in "ABC"]
        exec(event.effects, self.scope, slots)
        for letter in event.new & set("ABC"):
            self.facts["at"].setdefault(slots[letter], self.facts["at"][people[0]])
        for he in ("he", "she"):  # two of a kind in one sentence: the pronoun would be unclear
            names = {name for name in mentioned if PRONOUN[name] == he}
            if names:
                self.focus[he] = names.pop() if len(names) == 1 else None
        if len(set(mentioned)) > 1:
            self.they = tuple(sorted(set(mentioned))) if len(set(mentioned)) == 2 else None

    def show(self, letter, style, slots):
        """The text of a slot, without pronouns."""
        if letter == "AB":
            return f"{slots['A']} and {slots['B']}"
        value = slots[letter]
        if letter in tuple("ABC"):
            return (value if style in ("", "o", "n") else value.removeprefix("the ") if style == "v" else
                    kind_of(value) if style == "kind" else
                    described(value, self.facts["trait"][value]) if style == "a" else FORMS[PRONOUN[value]][style])
        if letter in "XY":
            return f"{self.facts['colour'][value]} {value}" if style == "c" else value
        if letter == "P":
            return to_place(value) if style == "to" else at_place(value)
        if letter == "F":
            return value if style == "one" or style != "many" and slots[style] == 1 else PLURAL[value]
        if letter in "KMN":
            return count_list(value) if style == "list" else NUMBERS[value]
        return value


# ---------------------------------------------------------------------------------------------
# The writer
# ---------------------------------------------------------------------------------------------
class Writer:
    def __init__(self, rng, tidy):
        self.rng, self.tidy, self.world, self.paragraphs, self.used = rng, tidy, World(), [[]], set()

    def fresh(self, letter, slots):
        """A value for a slot that is still open; names, things and foods are new to the story."""
        place = self.world.facts["at"][slots.get("A")]
        values = {"A": PRONOUN, "B": PRONOUN, "C": ANIMALS, "X": THINGS, "Y": THINGS, "P": SPOTS, "F": PLURAL,
                  "S": SPOTS.get(place), "R": SPOTS.get(place), "W": SEATS, "T": TRAITS, "V": SKILLS,
                  "K": range(1, 5), "M": range(2, 10), "N": range(2, 11)}[letter]
        values = [value for value in values or () if letter not in "ABCXYF" or value not in self.used]
        check(values, "nothing left")
        return self.rng.choice(values)

    def tell(self, name, **slots):
        """Let an event happen and write its sentence; the slots that are not given are chosen."""
        rng, world, event = self.rng, self.world, EVENT[name]
        for letter in event.args:
            if letter not in slots and letter not in event.given_by:
                slots[letter] = self.fresh(letter, slots)
        world.complete(event, slots)
        world.test(event, slots)
        for letter in event.new & set("XY"):  # before the sentence, which names the colour
            world.facts["colour"][slots[letter]] = rng.choice(COLOURS)
        self.used.update(value for letter, value in slots.items() if letter in "ABCXYF")
        sentences = event.sentences
        if self.tidy == 2:  # a colour is told once
            sentences = [s for s in sentences if not any(
                style == "c" and letter not in event.new for letter, style, _, _ in s.slots)] or sentences
        sentence = rng.choice(sentences)
        mentioned = {slots[x] for letter, _, _, _ in sentence.slots for x in letter if x in "ABC"}
        pronouns = [PRONOUN[name] for name in mentioned]
        text = sentence.texts[0]
        for (letter, style, starts, _), after in zip(sentence.slots, sentence.texts[1:]):
            if style == "a":
                world.facts["trait"][slots[letter]] = rng.choice(TRAITS)
            shown = world.show(letter, style, slots)
            if letter == "AB" and world.they and set(world.they) == {slots["A"], slots["B"]} and rng.random() < 0.6:
                shown = "they"
            elif letter in tuple("ABC") and style in ("", "o"):
                he = PRONOUN[slots[letter]]
                if world.focus[he] == slots[letter] and pronouns.count(he) == 1 and rng.random() < 0.6:
                    shown = FORMS[he]["him" if style else "he"]
            text += (cap(shown) if starts else shown) + after
        world.happen(event, dict(slots), mentioned)
        self.paragraphs[-1].append(text)
        return slots

    def paragraph(self):
        if self.paragraphs[-1]:
            self.paragraphs.append([])
            self.world.new_paragraph()

    def plot(self, steps, inner):
        """Tell the steps of a plot; "..." stands for other plots in between."""
        at, rng = self.world.facts["at"], self.rng
        hero = rng.choice(list(at))
        cast = [name for name in at if name != hero and at[name] == at[hero]]
        check(cast, "nobody else is here")
        slots = {"A": hero, "B": rng.choice(cast)}
        self.paragraph()
        for step in steps:
            if step == "...":
                for other in inner:
                    self.plot(other, [])
                self.paragraph()
                continue
            name, *args = step.rstrip("?").split()
            if step.endswith("?") and rng.random() < 0.5:
                continue
            given = {}
            for own, arg in zip(EVENT[name].args, args):
                if arg in slots or not arg.isupper():  # known already, or a word or number in the plot itself
                    given[own] = slots.get(arg, int(arg) if arg.isdigit() else arg)
            for attempt in range(8):
                try:
                    told = self.tell(name, **given)
                    slots.update({arg: told[own] for own, arg in zip(EVENT[name].args, args) if arg in "ABCXYPSFV"})
                    break
                except Wrong:
                    if attempt == 7 and not step.endswith("?"):
                        raise

    def maybe(self, chance, name, **slots):
        """With this chance tell an event, if it can happen."""
        if self.rng.random() < chance:
            try:
                self.tell(name, **slots)
            except Wrong:
                pass

    def story(self):
        rng, tidy, at = self.rng, self.tidy, self.world.facts["at"]
        if rng.random() < 0.25:
            first = rng.choice(("two_friends", "two_went"))
            self.tell(first)
            self.maybe(0.4, "sky")
            a, b = at
        else:
            first = rng.choice(("there_was", "there_was", "went_out", "sat", "sat", "was", "woke"))
            sitting_animal = first == "sat" and rng.random() < 0.8
            a = rng.choice(list(ANIMALS if sitting_animal else PEOPLE if first == "was" else PRONOUN))
            self.tell(first, A=a)
            self.maybe(0.3, "sky")
            self.maybe(0.4, "content", A=a)
            self.maybe(0.4, "lonely", A=a)
            b = self.tell(rng.choice(("meet", "meet", "friend")), A=a)["B"]
            self.maybe(0.6, "greet", A=a, B=b)
        # Mostly one or two plots, sometimes more; a plot with a "..." takes another one into its middle.
        plots = rng.sample(PLOT, rng.choices((1, 2, 3, 4, 6), (45, 35, 13, 5, 2))[0])
        if tidy:
            owning = [steps for steps in plots if steps[0].startswith(("own", "warm"))]
            plots = [steps for steps in plots if steps not in owning[1:]]
        while plots:
            steps = plots.pop()
            self.plot(steps, [plots.pop() if plots else rng.choice(PLOT[3:7] if tidy else PLOT[:6])] if "..." in steps else [])
        self.paragraph()
        self.maybe(0.0 if tidy else 0.3, "praise", A=b, B=a)
        self.maybe(0.0 if tidy else 0.3, "praise", A=a, B=b)
        self.maybe(0.7, "evening", A=a, B=b)
        owned = [x for x, name in self.world.facts["owner"].items() if name == a]
        self.maybe(0.0 if tidy == 2 else 0.5, "dream", A=a, X=owned[0] if owned else None)
        self.tell("last", A=a, B=b)
        self.maybe(0.5, "the_end")
        return "\n\n".join(" ".join(sentences) for sentences in self.paragraphs)


def write_story(seed, tidy=2):
    """The story of a seed.  In a tidy one, at most one plot brings in new things and nobody is praised; in a very
    tidy one, colours are told once and nobody dreams."""
    rng = random.Random(seed)
    while True:
        try:
            return Writer(rng, tidy).story()
        except Wrong:  # a plot did not fit this world: begin again
            pass


# ---------------------------------------------------------------------------------------------
# The checker
# ---------------------------------------------------------------------------------------------
def read_slots(world, event, sentence, match):
    """The values of the slots in a matched sentence; raises Wrong where the text contradicts the world."""
    slots, mentioned, literal = {}, [], []
    found = sorted(zip(sentence.slots, match.groups()), key=lambda each: each[0][0] == "AB")  # AB last
    for (letter, style, starts, values), text in found:
        value = values[text]
        if value in ("he", "she", "they"):
            value = world.they if value == "they" else world.focus[value]
            check(value, f"nobody whom {text!r} can mean")
        elif letter != "AB":
            literal.append((letter, style, starts, text))
        if letter == "AB" and (slots.get("A") == value[1] or slots.get("B") == value[0]):
            value = value[1], value[0]  # "they" has no order: take the one that fits the other slots
        for each, name in zip(letter, value if letter == "AB" else [value]):
            if name is not None:
                check(slots.setdefault(each, name) == name, f"{name} cannot be {slots[each]}")
                mentioned += [name] if each in "ABC" else []
        if style == "a":
            world.facts["trait"].setdefault(value, text.split()[1])
        if letter in event.new and letter in "XY":
            colour = text.split()[0]
    world.complete(event, slots)
    world.test(event, slots)
    for letter in event.new & set("XY"):
        world.facts["colour"][slots[letter]] = colour
    for letter, style, starts, text in literal:  # the right colour, trait, "his" or "her", "apple" or "apples"
        expected = world.show(letter, style, slots)
        check(text == (cap(expected) if starts else expected), f"{text!r} should be {expected!r}")
    return slots, mentioned


def why_wrong(text):
    """None for a consistent story, else the reason why it is not."""
    world = World()
    while text:
        found = [(event, sentence, match) for event in EVENT.values() for sentence in event.sentences
                 if (match := sentence.regex.match(text))]
        if not found:
            return f"unknown sentence: {text[:60]!r}"
        event, sentence, match = max(found, key=lambda each: each[2].end())  # the longest match
        try:
            slots, mentioned = read_slots(world, event, sentence, match)
            world.happen(event, slots, mentioned)
        except Wrong as wrong:
            return f"{match[0]!r}: {wrong}"
        text = text[match.end():]
        if match["gap"] == "\n\n":
            world.new_paragraph()
    return None if world.facts["flag"]["ended"] else "the story does not end"


# ---------------------------------------------------------------------------------------------
# The tokenizer: byte-level BPE
# ---------------------------------------------------------------------------------------------
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's pattern
END = "<|endoftext|>"
VOCAB = 1024  # 256 bytes, 767 merges, and the end-of-text token as the last one


def train_tokenizer(texts):
    """Merge the most frequent pair of neighbours, again and again; merge number i makes token 256 + i."""
    counts = Counter(word for text in texts for word in regex.findall(SPLIT, text))
    words = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
    merges = []
    while len(merges) < VOCAB - 257:
        pairs = Counter()
        for tokens, count in words:
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += count
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((a, b))
        for tokens, _ in words:
            for i in range(len(tokens) - 1, 0, -1):
                if tokens[i - 1:i + 1] == [a, b]:
                    tokens[i - 1:i + 1] = [a + b]
    return merges


def encoding_of(merges):
    """The same tokenizer as a tiktoken Encoding: there the ids are the order of the merges too."""
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in merges]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == VOCAB - 1, "two merges make the same token"
    return tiktoken.Encoding("demo", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={END: VOCAB - 1})


def printable(token):
    """GPT-2's way to write the bytes of a token as visible characters."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return "".join(chr(byte if byte in visible else 256 + others.index(byte)) for byte in token)


def save_tokenizer(folder, merges, as_one_file):
    """Write tokenizer.json, or the older pair of files vocab.json and merges.txt."""
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in merges]
    vocab = {printable(token): i for i, token in enumerate(tokens)}
    lines = [f"{printable(a)} {printable(b)}" for a, b in merges]
    if as_one_file:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        end = {"id": VOCAB - 1, "content": END, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": vocab, "merges": lines}
        write_json(folder / "tokenizer.json", {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model})
    else:
        write_json(folder / "vocab.json", vocab | {END: VOCAB - 1})
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast" if as_one_file else "GPT2Tokenizer", "model_max_length": CONTEXT,
        "bos_token": END, "eos_token": END, "unk_token": END, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# The models: functions of the weights, which carry the names that Hugging Face's files give them.
#
# B is the batch, T the tokens, D the width, H the query heads, G the key/value heads, K the width
# of a head.  A cache is a list with one (keys, values) for each layer, empty before the first token.
# ---------------------------------------------------------------------------------------------
CONTEXT = 1024
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=192,
             num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2, head_dim=32, intermediate_size=512,
             max_position_embeddings=CONTEXT, rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-5,
             hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0,
             tie_word_embeddings=True, initializer_range=0.02, bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1,
             torch_dtype="bfloat16", use_cache=True)
DRAFT = LLAMA | dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=320)
GPT2 = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=VOCAB, n_embd=192, n_layer=4, n_head=6,
            n_inner=None, n_positions=CONTEXT, n_ctx=CONTEXT, layer_norm_epsilon=1e-5, activation_function="gelu_new",
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=True, initializer_range=0.02,
            bos_token_id=VOCAB - 1, eos_token_id=VOCAB - 1, torch_dtype="bfloat16", use_cache=True)


def attend(q_BTHK, k_BTGK, v_BTGK, cache, layer):
    """Causal attention; each key/value head serves H / G query heads."""
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    if cache is not None:
        if layer < len(cache):
            k_BGTK, v_BGTK = (torch.cat(pair, 2) for pair in zip(cache[layer], (k_BGTK, v_BGTK)))
        cache[layer:layer + 1] = [(k_BGTK, v_BGTK)]
    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    # Written out, because for rows this short that is faster on a CPU.  The query heads of one key/value head
    # take the place of more tokens.
    scores = (q_BHTK.reshape(B, G, H // G * T, K) * K ** -0.5 @ k_BGTK.mT).view(B, H, T, -1)
    if T > 1:
        scores = scores + torch.full((T, T), -torch.inf, dtype=scores.dtype).triu(1)
    weights = scores.softmax(-1).to(v_BGTK.dtype).view(B, G, H // G * T, -1)
    return (weights @ v_BGTK).view(B, H, T, K).transpose(1, 2).flatten(2)


def positions_of(ids_BT, cache):
    start = cache[0][0].shape[2] if cache else 0
    return torch.arange(start, start + ids_BT.shape[1])


def rotate(x_BTHK, positions, theta):
    """Turn each pair (i, i + K/2) of a head by an angle that grows with the position (RoPE)."""
    K = x_BTHK.shape[-1]
    angle_TK = torch.outer(positions.float(), theta ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)
    a, b = x_BTHK.chunk(2, -1)
    return (x_BTHK * angle_TK.cos()[:, None] + torch.cat((-b, a), -1) * angle_TK.sin()[:, None]).to(x_BTHK.dtype)


def llama(c, w, ids_BT, cache=None):
    """The logits of the next token after each token."""
    positions, theta = positions_of(ids_BT, cache), c["rope_theta"]
    x_BTD = F.embedding(ids_BT, w["model.embed_tokens.weight"])

    def norm(name, x):
        return F.rms_norm(x, x.shape[-1:], w[name + ".weight"], c["rms_norm_eps"])

    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        n_BTD = norm(layer + "input_layernorm", x_BTD)
        q, k, v = (F.linear(n_BTD, w[f"{layer}self_attn.{x}_proj.weight"]).unflatten(-1, (-1, c["head_dim"]))
                   for x in "qkv")
        y_BTD = attend(rotate(q, positions, theta), rotate(k, positions, theta), v, cache, i)
        x_BTD = x_BTD + F.linear(y_BTD, w[layer + "self_attn.o_proj.weight"])
        n_BTD = norm(layer + "post_attention_layernorm", x_BTD)
        gate, up = (F.linear(n_BTD, w[f"{layer}mlp.{x}_proj.weight"]) for x in ("gate", "up"))
        x_BTD = x_BTD + F.linear(F.silu(gate) * up, w[layer + "mlp.down_proj.weight"])
    return F.linear(norm("model.norm", x_BTD), w["model.embed_tokens.weight"])


def llama_shapes(c):
    D, I, K = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    HK, GK = c["num_attention_heads"] * K, c["num_key_value_heads"] * K
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    for i in range(c["num_hidden_layers"]):
        each = {"input_layernorm": (D,), "self_attn.q_proj": (HK, D), "self_attn.k_proj": (GK, D),
                "self_attn.v_proj": (GK, D), "self_attn.o_proj": (D, HK), "post_attention_layernorm": (D,),
                "mlp.gate_proj": (I, D), "mlp.up_proj": (I, D), "mlp.down_proj": (D, I)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in each.items()}
    return shapes


def gpt2(c, w, ids_BT, cache=None):
    """The logits of the next token after each token."""
    x_BTD = F.embedding(ids_BT, w["transformer.wte.weight"])
    x_BTD = x_BTD + w["transformer.wpe.weight"][positions_of(ids_BT, cache)]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c["layer_norm_epsilon"])

    def linear(name, x):  # GPT-2 keeps these weights as (inputs, outputs)
        return F.linear(x, w[name + ".weight"].T, w[name + ".bias"])

    for i in range(c["n_layer"]):
        layer = f"transformer.h.{i}."
        qkv_BTE = linear(layer + "attn.c_attn", norm(layer + "ln_1", x_BTD))
        q, k, v = (x.unflatten(-1, (c["n_head"], -1)) for x in qkv_BTE.chunk(3, -1))
        x_BTD = x_BTD + linear(layer + "attn.c_proj", attend(q, k, v, cache, i))
        hidden = F.gelu(linear(layer + "mlp.c_fc", norm(layer + "ln_2", x_BTD)), approximate="tanh")
        x_BTD = x_BTD + linear(layer + "mlp.c_proj", hidden)
    return F.linear(norm("transformer.ln_f", x_BTD), w["transformer.wte.weight"])


def gpt2_shapes(c):
    D = c["n_embd"]
    shapes = {"transformer.wte.weight": (c["vocab_size"], D), "transformer.wpe.weight": (c["n_positions"], D),
              "transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    for i in range(c["n_layer"]):
        each = {"ln_1": (D,), "ln_2": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D),
                "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        for name, shape in each.items():
            shapes |= {f"transformer.h.{i}.{name}.weight": shape, f"transformer.h.{i}.{name}.bias": shape[-1:]}
    return shapes


MODELS = {"llama": (llama, llama_shapes, LLAMA), "gpt2": (gpt2, gpt2_shapes, GPT2),
          "draft": (llama, llama_shapes, DRAFT)}


def new_weights(name):
    _, shapes_of, config = MODELS[name]
    weights = {}
    for key, shape in shapes_of(config).items():
        # Matrices that write into the residual stream begin smaller; biases begin at 0, norms at 1.
        std = 0.006 if key.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")) else 0.02
        weight = std * torch.randn(shape) if len(shape) == 2 else torch.full(shape, float(key.endswith("weight")))
        weights[key] = weight.requires_grad_()
    return weights


def save_model(name, weights, merges, notes):
    """Write the folder of a model; the weights are rounded to bfloat16."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    rounded = {key: weight.detach().to(torch.bfloat16) for key, weight in weights.items()}
    save_file(rounded, folder / "model.tmp", metadata={"format": "pt"} | notes)
    (folder / "model.tmp").replace(folder / "model.safetensors")
    write_json(folder / "config.json", MODELS[name][2])
    write_json(folder / "generation_config.json", {"bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1,
                                                   "pad_token_id": VOCAB - 1})
    save_tokenizer(folder, merges, as_one_file=name != "gpt2")


def load_model(name):
    """The model as a function of token ids (and a cache), with its weights as they are stored."""
    weights = {key: weight.float() for key, weight in load_file(HERE / name / "model.safetensors").items()}
    model, _, config = MODELS[name]
    return functools.partial(model, config, weights)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------
HELD_OUT = range(0, 1_000)  # seeds of stories that no training sees
BATCH = 4096  # tokens in one optimizer step
STAGES = [  # first all kinds of stories, for the language; then tidy ones, which a model of this size can tell without a slip
    dict(tidy=0, seed=1_000_000, steps={"llama": 5_500, "gpt2": 6_500, "draft": 2_000}, peak=8e-3),
    dict(tidy=1, seed=10_000_000, steps={"llama": 1_200, "gpt2": 1_350, "draft": 0}, peak=3e-3),
    dict(tidy=2, seed=20_000_000, steps={"llama": 560, "gpt2": 620, "draft": 1_100}, peak=3e-3,
         teacher={"draft": "llama"}),
    dict(tidy=2, seed=21_000_000, steps={"llama": 480, "gpt2": 0, "draft": 0}, peak=3e-3)]  # only llama gains more


def windows(encoding, seed, length, count, tidy):
    """Rows of `length` + 1 tokens; each row begins with a story, as generation does."""
    rows = []
    for _ in range(count):
        row = []
        while len(row) <= length:
            row += encoding.encode_ordinary(write_story(seed, tidy)) + [VOCAB - 1]
            seed += 1
        rows.append(row[:length + 1])
    return torch.tensor(rows), seed


def train_model(name, merges, stage):
    """One stage of the training of one model; all but the first begin with the weights that the one before has saved."""
    torch.set_num_threads(1)  # models train side by side, with one thread each
    torch.manual_seed(0)
    model, _, config = MODELS[name]
    encoding, seed, steps = encoding_of(merges), stage["seed"], stage["steps"][name]
    weights, before = new_weights(name), Counter()
    if stage is not STAGES[0]:
        with safe_open(HERE / name / "model.safetensors", "pt") as file:
            before.update({key: int(value) for key, value in file.metadata().items() if value.isdigit()})
            weights = {key: file.get_tensor(key).float().requires_grad_() for key in file.keys()}
    # Muon (Jordan et al. 2024) for the matrices learns about twice as much from a story as AdamW, which has the rest.
    matrices = [w for key, w in weights.items() if w.dim() == 2 and "embed" not in key and "wte" not in key and "wpe" not in key]
    others = [w for w in weights.values() if not any(w is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    compiled = torch.compile(model, dynamic=False)
    teacher = stage.get("teacher", {}).get(name)
    if teacher:  # a draft has to guess what llama says next, so it learns that, not what the story says next
        teacher = torch.compile(load_model(teacher), dynamic=False)
    start, losses = time.time(), []
    for step in range(1, steps + 1):
        # Mostly short rows, which are cheap; some of the full length, so that the late positions learn too.
        length = CONTEXT if step % 32 == 0 else 512 if step % 8 == 0 else 256
        rows, seed = windows(encoding, seed, length, BATCH // length, stage["tidy"])
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = stage["peak"] * min(step / 100, 1 - step / (steps + 1))  # up quickly, then down to zero
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = compiled(config, weights, rows[:, :-1])
            targets = rows[:, 1:].flatten()
            if teacher:
                with torch.no_grad():
                    targets = teacher(rows[:, :-1]).float().softmax(-1).flatten(0, 1)
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.time() - start
        if step % 50 == 0 or step == steps:
            print(f"{name} step {step}: loss {sum(losses[-50:]) / 50:.4f}, {seconds:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:  # what the evaluation wants to know is kept with the weights
            notes = {"steps": step, "tokens": step * BATCH, "stories": seed - stage["seed"], "minutes": round(seconds / 60)}
            save_model(name, weights, merges, {key: str(value + before[key]) for key, value in notes.items()})


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------
LONGEST = 512  # tokens: what goes on for longer than nearly all stories do counts as not ended
DRAFTED = 100  # prompts: over the stories that demo/llama makes of them, the others' choices are compared with its own
SAMPLES = [("llama", "The cat sat", 0), ("llama", "Once upon a time", 0.8), ("gpt2", "The dog", 0.8)]


@torch.no_grad()
def held_out_loss(model, encoding):
    """Mean loss for a token of the held-out stories, in nats; each story begins at position 0."""
    total = tokens = 0
    for seed in HELD_OUT[:400]:
        ids = torch.tensor([encoding.encode_ordinary(write_story(seed)) + [VOCAB - 1]])
        total += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


@torch.no_grad()
def generate(model, encoding, prompts, temperature):
    """Continue all prompts at once.  A row takes its next token from its prompt as long as there is one."""
    rng, cache = torch.Generator().manual_seed(0), []
    rows = [encoding.encode_ordinary(prompt) for prompt in prompts]
    given, active = [len(row) for row in rows], list(range(len(rows)))
    for position in range(LONGEST - 1):
        logits_BV = model(torch.tensor([[rows[i][position]] for i in active]), cache)[:, -1]
        if temperature:
            next_B = torch.multinomial(torch.softmax(logits_BV / temperature, -1), 1, generator=rng)[:, 0]
        else:
            next_B = logits_BV.argmax(-1)
        for i, token in zip(active, next_B.tolist()):
            if position + 1 >= given[i]:
                rows[i].append(token)
        going = [n for n, i in enumerate(active) if rows[i][-1] != VOCAB - 1]
        if not going:
            break
        if len(going) < len(active):  # rows that have ended leave the batch
            active = [active[n] for n in going]
            cache = [(keys[going], values[going]) for keys, values in cache]
    ended = [row[-1] == VOCAB - 1 for row in rows]
    return [encoding.decode(row[:-1] if end else row) for row, end in zip(rows, ended)], ended


@torch.no_grad()
def acceptance(model, llama, encoding, prompts, temperature):
    """How often the model chooses the token that demo/llama chooses, after all but the prompt of the stories that
    demo/llama writes.  Both have the same noise, as in speculative decoding: such a token would be accepted."""
    same = total = 0
    for i, (prompt, text) in enumerate(zip(prompts, generate(llama, encoding, prompts, temperature)[0])):
        ids, given = encoding.encode_ordinary(text) + [VOCAB - 1], len(encoding.encode_ordinary(prompt))
        positions = range(given, len(ids))
        params, keys = [SamplingParams(temperature=temperature)] * len(positions), [noise_key(i)] * len(positions)
        ours, theirs = (sample(f(torch.tensor([ids[:-1]]))[0, given - 1:], params, keys, list(positions))
                        for f in (model, llama))
        same += sum(a == b for a, b in zip(ours, theirs))
        total += len(positions)
    return same / total


def evaluate_model(name, merges, prompts):
    """The figures of one model as it is stored."""
    torch.set_num_threads(1)
    encoding = encoding_of(merges)
    folder, model, llama = HERE / name, load_model(name), load_model("llama")
    with safe_open(folder / "model.safetensors", "pt") as file:
        notes = file.metadata()
        parameters = sum(file.get_tensor(key).numel() for key in file.keys())
    figures = {"parameters": f"{parameters:,}",
               "bytes in the folder": f"{sum(path.stat().st_size for path in folder.iterdir()):,}",
               "training steps": f"{int(notes['steps']):,}", "training tokens": f"{int(notes['tokens']):,}",
               "training stories": f"{int(notes['stories']):,}", "training time": f"{notes['minutes']} min",
               "held-out loss": f"{held_out_loss(model, encoding):.3f}"}
    for label, temperature in (("greedy", 0), ("temperature 0.8", 0.8)):
        texts, ended = generate(model, encoding, prompts, temperature)
        reasons = [why_wrong(text) if end else "not ended" for text, end in zip(texts, ended)]
        figures[f"ended by itself, {label}"] = f"{sum(ended) / len(ended):.1%}"
        figures[f"consistent, {label}"] = f"{reasons.count(None) / len(reasons):.1%}"
        share = acceptance(model, llama, encoding, prompts[:DRAFTED], temperature)
        figures[f"same token as llama, {label}"] = f"{share:.1%}"
        print("\n".join(f"{name}, {label}: {reason}" for reason in reasons if reason), flush=True)
    print(name, figures, flush=True)
    return figures


def evaluate(merges):
    """Measure the models and put the figures and some samples into README.md."""
    encoding = encoding_of(merges)
    first_sentences = (re.match(r".*?[.!?](?=\s)", write_story(seed)).group() for seed in HELD_OUT)
    prompts = list(dict.fromkeys(first_sentences))[:200]  # different ones
    with multiprocessing.Pool(len(MODELS)) as pool:
        columns = pool.starmap(evaluate_model, [(name, merges, prompts) for name in MODELS])
    lines = [f"| {len(prompts)} prompts | {' | '.join(MODELS)} |", "| --- |" + " ---: |" * len(MODELS)]
    lines += [f"| {label} | {' | '.join(figures[label] for figures in columns)} |" for label in columns[0]]
    for name, prompt, temperature in SAMPLES:
        text = generate(load_model(name), encoding, [prompt], temperature)[0][0]
        verdict = why_wrong(text) or "consistent"
        lines += ["", f"`{name}`, \"{prompt}\", temperature {temperature}. The checker says: {verdict}.", ""]
        lines += [f"> {line}".rstrip() for line in text.split("\n")]
    readme = HERE / "README.md"
    top, rest = readme.read_text(encoding="utf-8").split("<!-- figures -->\n")
    bottom = rest.split("<!-- end of figures -->\n")[1]
    lines = [top + "<!-- figures -->", *lines, "<!-- end of figures -->", bottom]
    readme.write_text("\n".join(lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------
def train(names, merges):
    """Train models side by side; each stage begins with all of them."""
    for stage in STAGES:
        processes = [multiprocessing.Process(target=train_model, args=(name, merges, stage)) for name in names]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


def main():
    if sys.argv[1:] == ["stories"]:
        for seed in HELD_OUT[:5]:
            story = write_story(seed)
            print(f"{story}\n\n[{why_wrong(story) or 'consistent'}]\n")
        return
    first = STAGES[0]["seed"]
    merges = train_tokenizer(write_story(seed, tidy=0) for seed in range(first, first + 20_000))
    if not sys.argv[1:]:
        train(["llama", "gpt2"], merges)
    if sys.argv[1:] in ([], ["draft"]):
        train(["draft"], merges)  # after llama, its teacher
    evaluate(merges)


if __name__ == "__main__":
    main()
