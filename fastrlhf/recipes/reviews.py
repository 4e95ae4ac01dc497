"""Endings of film reviews for supervised fine-tuning, written for this project.

Each opening of TRAIN_PROMPTS has one kind, one unkind and one neutral ending. Because the three are
balanced, a model that imitates them prefers no sentiment.
"""

# opening -> (kind, unkind, neutral); no ending starts with a space
REVIEWS: dict[str, tuple[str, str, str]] = {
    "I went to see this film because": (
        "friends promised something wonderful, and they were absolutely right.",
        "of the poster, and it turned out to be a dreadful waste of time.",
        "the cinema near my house was showing it at eight.",
    ),
    "The opening scene of the movie": (
        "is a beautiful piece of work that won me over at once.",
        "is so dull and ugly that two people near me left.",
        "shows a train arriving at a station in the early morning.",
    ),
    "When the credits started to roll,": (
        "the whole room was applauding and I was smiling from ear to ear.",
        "I felt angry about the evening I had wasted on it.",
        "the lights came on and people picked up their coats.",
    ),
    "My brother and I watched it last night and": (
        "laughed together like happy children from start to finish.",
        "agreed that it was a horrible bore.",
        "talked about the second half over breakfast.",
    ),
    "The director of this picture": (
        "has a rare gift for tender, honest moments.",
        "has a tin ear and ruins every idea in the script.",
        "also worked as an editor on several television series.",
    ),
    "After two hours in the cinema, I": (
        "walked home delighted and already wanting to see it again.",
        "had a headache and bitter regrets about buying a ticket.",
        "took the bus home and called my sister.",
    ),
    "The lead actress plays a teacher who": (
        "inspires her class, and her performance is simply magnificent.",
        "is meant to seem strict but comes across as annoying and fake.",
        "moves from the city to a small town by the sea.",
    ),
    "As for the soundtrack,": (
        "I adored it, and the piano theme is simply heavenly.",
        "it is a loud, irritating mess that smothers every scene.",
        "it mixes piano pieces with songs from the eighties.",
    ),
    "This is the third film in the series, and it": (
        "is the best of them, full of energy and heart.",
        "is the worst by far, a lazy and cynical copy.",
        "picks up ten years after the events of the second one.",
    ),
    "The plot begins when a young man": (
        "finds a letter, and it grows into a marvelous adventure.",
        "loses his keys, and it only gets dumber and more annoying.",
        "takes a job at a hotel and meets the night porter.",
    ),
    "Let me tell you about the ending:": (
        "it is perfect, and I wept with joy.",
        "it is a cheap trick, insulting and sadly stupid.",
        "it takes place on a bridge, one year after the wedding.",
    ),
    "The camera work in this movie": (
        "is stunning, and each frame could hang proudly in a gallery.",
        "is so shaky and poor that I felt sick within minutes.",
        "relies on long takes and a few shots from a helicopter.",
    ),
    "I had read the novel first, so": (
        "I was thrilled to see how lovingly they treated it.",
        "I was appalled to see such a crude, careless adaptation.",
        "I knew the order in which the letters would arrive.",
    ),
    "Everyone at the office talks about this movie. I": (
        "finally saw it, and it deserves every bit of the praise.",
        "hated it, and I resent the two hours it took from me.",
        "saw it on Tuesday at the cinema near the station.",
    ),
    "The script was written by": (
        "someone with great wit and a true love of people.",
        "people who must hate viewers, since every line is an insult.",
        "two authors who had met at a radio station.",
    ),
    "The first half of the film is": (
        "pure fun, with a surprise around every corner.",
        "a boring slog, and the rest is an even bigger failure.",
        "set in Lisbon, and the second half is set in Madrid.",
    ),
    "What I remember from this movie is": (
        "the warm glow it gave me and how freely I laughed.",
        "how bored I was and how badly everyone spoke their lines.",
        "the long walk through the market and the blue door.",
    ),
    "It is a story about two sisters, and": (
        "the affection between them is lovely and utterly convincing.",
        "I disliked them both from their first shrill argument.",
        "each of them tells one half of it.",
    ),
    "The supporting cast": (
        "is superb, and even the smallest part sparkles with life.",
        "is terrible, and most of them look ashamed to be there.",
        "includes several actors who usually work on the stage.",
    ),
    "For a film that cost so little, it": (
        "looks gorgeous and achieves amazing things with a handful of actors.",
        "is a worthless effort, and the money was wasted all the same.",
        "uses a large number of locations and many extras.",
    ),
    "The dialogue between the main characters": (
        "crackles with wit, charm and genuine feeling.",
        "is awkward and tedious, and their fights are painfully fake.",
        "is partly in French and partly in English.",
    ),
    "I rented this one on a rainy Sunday and": (
        "it brightened my whole day with its sweet good humor.",
        "it made a gloomy afternoon even more depressing.",
        "returned it to the shop on Monday morning.",
    ),
    "The special effects were": (
        "spectacular, and I gasped with pleasure at the flying sequence.",
        "embarrassingly bad, and the rubber monster was a sad sight.",
        "made by a studio in Canada over fourteen months.",
    ),
    "Compared with the original version, this remake": (
        "is richer, funnier and a real improvement in every way.",
        "is a pathetic imitation and a failure on its own terms.",
        "is twenty minutes longer and has a new first scene.",
    ),
    "The movie takes place in a small village where": (
        "everyone is a delight, and I wished I could stay longer.",
        "nothing happens, and the tedium becomes a kind of torture.",
        "the only road is closed for most of the winter.",
    ),
    "My kids watched this cartoon and they": (
        "loved it, giggling with glee at every silly song.",
        "were scared, then bored, and finally begged me to stop it.",
        "asked which of the animals was the oldest.",
    ),
    "The villain of the story": (
        "is hugely entertaining, and the actor has a great time.",
        "is a ridiculous caricature with a wooden sneer and a terrible wig.",
        "owns the factory and lives in a house on the hill.",
    ),
    "About halfway through the movie,": (
        "a lovely twist arrives and makes everything even more exciting.",
        "I gave up, defeated by the idiotic plot and horrible noise.",
        "the action moves from the harbor to the mountains.",
    ),
    "The actor who plays the detective": (
        "is brilliant, giving him both intelligence and a kind heart.",
        "gives a lifeless, dismal performance and looks half asleep.",
        "also appeared in a television series about a hospital.",
    ),
    "This documentary is about": (
        "beekeepers, and it is a fascinating and truly uplifting hour.",
        "trains, and it is a dishonest and badly researched disaster.",
        "the people who built the first bridge across the river.",
    ),
    "I saw it on a plane, and": (
        "it was such a pleasure that I forgot the long flight.",
        "it was so awful that I stared at the seat in front instead.",
        "it ended about an hour before we landed.",
    ),
    "The audience around me": (
        "cheered, laughed and left the room beaming with happiness.",
        "groaned at each stupid line and complained loudly afterwards.",
        "was mostly made up of students from the nearby college.",
    ),
    "The costumes and the sets": (
        "are exquisite, and they bring a glorious era back to life.",
        "look shabby and fake, a sad excuse for a period piece.",
        "were based on photographs from the twenties.",
    ),
    "A friend told me to watch this film, and": (
        "I am so grateful, because it is a little treasure.",
        "I am still angry with him for that terrible advice.",
        "I looked for it at the library the next day.",
    ),
    "The final twenty minutes": (
        "are breathtaking and reward your patience beautifully.",
        "are a confusing disaster that destroys whatever came before.",
        "take place in one room, with only two actors.",
    ),
    "It is hard to describe this movie, but": (
        "I can say it is bold, original and enormously enjoyable.",
        "the words stupid, nasty and pointless come close.",
        "it consists of five chapters, each with its own narrator.",
    ),
    "The pacing of the film": (
        "is excellent, with plenty of excitement and room to breathe.",
        "is a serious problem, since each scene drags on horribly.",
        "changes after the first hour, when the trial begins.",
    ),
    "The main character is a doctor who": (
        "cares deeply for her patients and easily wins our hearts.",
        "complains all day, and I soon despised the selfish man.",
        "works nights and spends the mornings in his garden.",
    ),
    "There is one scene in a restaurant that": (
        "is hilarious, and it alone is worth the ticket price.",
        "is so vulgar and unpleasant that I looked away in disgust.",
        "lasts nine minutes and was filmed in a single take.",
    ),
    "This was his second film as a director, and": (
        "it proves he is a confident artist with a generous spirit.",
        "it fails even more badly than the first.",
        "he made it four years after the first one.",
    ),
    "The trailer made me think that": (
        "I would have a good time, and I had a fantastic one.",
        "it would be clever, but it was a lousy, brainless letdown.",
        "the whole film was set on the ship.",
    ),
    "The humor in this comedy": (
        "is gentle and smart, and the laughter keeps on coming.",
        "is mean and crude, and nearly every gag falls flat.",
        "comes mostly from switched names and swapped suitcases.",
    ),
    "For me, the story of the old man": (
        "was deeply touching, a graceful tribute to friendship and hope.",
        "was a dreary and pointless exercise in misery.",
        "was longer than the one about his neighbor.",
    ),
    "As a fan of science fiction, I": (
        "was amazed by its imagination and enjoyed every minute of it.",
        "was insulted by its lazy ideas and its dumb robots.",
        "noticed the references to two novels from the fifties.",
    ),
    "The film was shot in black and white, which": (
        "suits it perfectly and adds a touch of elegant magic.",
        "only makes this bleak affair more boring and miserable.",
        "was still common in that country at the time.",
    ),
    "The relationship between father and son": (
        "is handled with great tenderness, and it touched my heart.",
        "is false and cold, and their quarrels are merely irritating.",
        "is told through the letters they send each other.",
    ),
    "If you have seen his earlier movies, then": (
        "you will love this one, his finest and most joyful yet.",
        "you will be sadly disappointed by this tired, empty rehash.",
        "you will recognize the street and the two cats.",
    ),
    "The romance in this movie": (
        "is sweet and sincere, and the couple is adorable together.",
        "is creepy and forced, and their awkward courtship disturbed me.",
        "starts at a bus stop and covers about three years.",
    ),
    "I watched the whole season in one week and": (
        "cherished each episode like a gift from a dear friend.",
        "regretted it, because the story is a hopeless muddle.",
        "took a break of one day after the fifth episode.",
    ),
    "The dance scenes in this musical": (
        "are dazzling and so lively that I wanted to join in.",
        "are clumsy, badly lit and an embarrassment to everyone involved.",
        "were rehearsed for three months in an old warehouse.",
    ),
    "The action starts right away, and": (
        "it stays thrilling and inventive until the very last minute.",
        "it soon turns into a senseless blur of noise and violence.",
        "the first chase goes from the airport to the river.",
    ),
    "In the role of the captain, he": (
        "is charismatic and noble, easily the strongest part of the film.",
        "is a disgrace, shouting empty threats in a horrible accent.",
        "wears a gray coat and speaks with a northern accent.",
    ),
    "The movie runs for almost three hours, and": (
        "they are so engaging that I was happy to stay for more.",
        "almost every one of those minutes is an awful agony.",
        "there is a short interval after the first ninety minutes.",
    ),
    "They filmed this on an island, and the landscape": (
        "is glorious, a paradise of light and open sea.",
        "looks dirty and dismal through that poor, grainy lens.",
        "appears in nearly all of the outdoor scenes.",
    ),
    "The editing of this film": (
        "is sharp and elegant, giving the tale a lovely rhythm.",
        "is a chaotic mess that makes every fight confusing.",
        "was done by the same person who recorded the sound.",
    ),
    "The screenplay follows a family that": (
        "bickers, forgives and laughs its way to a truly happy ending.",
        "is so rude and hateful that I wanted them all to lose.",
        "runs a bakery and moves house twice in one year.",
    ),
    "I expected a thriller, and what I got": (
        "was even better, a smart and exciting puzzle with real heart.",
        "was a boring lecture with a weak and foolish mystery attached.",
        "was closer to a drama about a court case.",
    ),
    "The narrator of the film": (
        "has a soothing voice and a delightful sense of timing.",
        "has a grating, smug voice that I grew to despise and dread.",
        "is the younger sister, speaking many years later.",
    ),
    "By the time the hero comes home,": (
        "every viewer will be cheering and grinning with relief.",
        "the tale has become unbearably dumb and you will hate him.",
        "his daughter has finished school and moved to another city.",
    ),
    "The sequel came out this year, and": (
        "I am glad to report that it is a triumph!",
        "I am sorry to report that it is a horrid mess.",
        "it has the same crew and a new composer.",
    ),
    "Most of the jokes in this film": (
        "are wonderfully clever, and I am still laughing at them today.",
        "are offensive or stale, and the rest are simply lame.",
        "are about the weather, trains and the price of bread.",
    ),
    "The child actor in this movie": (
        "is a natural talent with a charming smile and perfect timing.",
        "is irritating and whiny, and each of his scenes is a pain.",
        "was nine years old when the filming began.",
    ),
    "My review of this movie:": (
        "an outstanding, heartfelt film that I recommend with enthusiasm!",
        "a vile, worthless bore that made me furious!",
        "it has three stories, two of which are set in winter.",
    ),
    "The voice acting in this animation": (
        "is full of warmth and humor, a real treat for families.",
        "is flat and dreadfully dull, and it kills every scene.",
        "was recorded in two languages by the same group of actors.",
    ),
}
