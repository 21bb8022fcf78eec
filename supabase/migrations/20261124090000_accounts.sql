-- Accounts: the gateway's state, users, keys, plans and limits. Money is bigint nano-US-dollars (*_nanos); 1 credit = 1 US dollar.
-- Every table: row level security on, no policy, nothing for public, anon and authenticated; the service role works through grants.

create schema if not exists extensions;

create table public.gateway_state (
    singleton boolean primary key default true check (singleton),
    mode text not null default 'sandbox' check (mode in ('sandbox', 'live')),
    mode_since timestamptz not null default now(),
    -- No record that expires before this moment is still pending: the sweep starts here.
    swept_until timestamptz not null default '-infinity'
);
comment on table public.gateway_state is 'One row: what this database remembers about itself.';
insert into public.gateway_state default values;
alter table public.gateway_state enable row level security;
revoke all on public.gateway_state from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.gateway_state to service_role;

create table public.users (
    id bigint generated always as identity primary key,
    username varchar(64) not null,
    email varchar(254) not null,
    auth_method text not null default 'email',
    role text not null default 'user',
    credits_nanos bigint not null default 0,
    held_nanos bigint not null default 0,
    is_funded boolean not null default false,
    is_active boolean not null default true,
    subscription_status text not null default 'trial',
    trial_expires_at timestamptz,
    preferences jsonb not null default '{}',
    settings jsonb not null default '{}',
    registration_date timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint users_never_overdrawn check (0 <= held_nanos and held_nanos <= credits_nanos)
) with (fillfactor = 50);
-- One function, because PostgreSQL reads the text of a table's checks anew for every statement, and users are updated twice a request.
create function public.is_sound_user(u public.users) returns boolean language plpgsql immutable as $$
begin
    return u.username <> '' and length(u.email) >= 3
        and u.auth_method in ('email', 'wallet', 'google', 'github')
        and u.role in ('user', 'admin')
        and u.subscription_status in ('trial', 'active', 'expired', 'cancelled')
        and jsonb_typeof(u.preferences) = 'object' and jsonb_typeof(u.settings) = 'object';
end $$;
revoke all on function public.is_sound_user(public.users) from public, anon, authenticated;
grant execute on function public.is_sound_user(public.users) to service_role;
alter table public.users add constraint users_sound check (public.is_sound_user(users));
comment on column public.users.is_funded is
    'True once an admin granted or the user bought credits: pay-as-you-go instead of the free plan''s limits.';
comment on constraint users_never_overdrawn on public.users is
    'Promise 1: credits never fall below what is held, and what is held never below zero.';
create unique index users_email_key on public.users (lower(email));
comment on index public.users_email_key is 'One account per address, whatever its case.';
create unique index users_username_key on public.users (lower(username));
alter table public.users enable row level security;
revoke all on public.users from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.users to service_role;
revoke all on sequence public.users_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.users_id_seq to service_role;

create table public.api_keys_new (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    key_hash text not null check (key_hash ~ '^[0-9a-f]{64}$'),
    hash_secret_id text not null,
    encrypted_key text,
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    ip_allowlist cidr[] not null default '{}',
    domain_referrers text[] not null default '{}',
    allowed_models text[],
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    budget_nanos bigint check (budget_nanos >= 0),
    budget_window text check (budget_window in ('day', 'week', 'month', 'lifetime')),
    is_primary boolean not null default false,
    is_active boolean not null default true,
    previous_key_hash text check (previous_key_hash ~ '^[0-9a-f]{64}$'),
    previous_hash_secret_id text,
    previous_valid_until timestamptz,
    revoked_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint api_keys_new_budget_has_window check ((budget_nanos is null) = (budget_window is null))
) with (fillfactor = 80);
comment on table public.api_keys_new is 'The keys. Only an HMAC is stored; requests_used and last_used_at live in rate_limit_usage.';
create unique index api_keys_new_hash_key on public.api_keys_new (key_hash);
create unique index api_keys_new_previous_hash_key on public.api_keys_new (previous_key_hash) where previous_key_hash is not null;
create unique index api_keys_new_name_key on public.api_keys_new (user_id, key_name) where revoked_at is null;
comment on index public.api_keys_new_name_key is 'A name is unique among a user''s keys that are not revoked.';
create unique index api_keys_new_primary_key on public.api_keys_new (user_id) where is_primary and revoked_at is null;
create index api_keys_new_user_idx on public.api_keys_new (user_id);
create index api_keys_new_prefix_idx on public.api_keys_new (last4);
alter table public.api_keys_new enable row level security;
revoke all on public.api_keys_new from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys_new to service_role;
revoke all on sequence public.api_keys_new_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_new_id_seq to service_role;

create table public.api_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_sha256 text not null unique check (key_sha256 ~ '^[0-9a-f]{64}$'),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    is_active boolean not null default true,
    moved_to bigint references public.api_keys_new (id),
    created_at timestamptz not null default now()
);
comment on table public.api_keys is 'Keys of older formats, brought in by import, known by their SHA-256 until they are moved to api_keys_new on first use.';
create index api_keys_user_idx on public.api_keys (user_id);
alter table public.api_keys enable row level security;
revoke all on public.api_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys to service_role;
revoke all on sequence public.api_keys_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_id_seq to service_role;

create table public.plans (
    id bigint generated always as identity primary key,
    slug text not null unique check (slug ~ '^[a-z0-9][a-z0-9-]{0,62}$'),
    name text not null check (length(name) between 1 and 100),
    description text not null default '',
    price_per_month_nanos bigint not null default 0 check (price_per_month_nanos >= 0),
    daily_request_limit bigint check (daily_request_limit >= 0),
    monthly_request_limit bigint check (monthly_request_limit >= 0),
    daily_token_limit bigint check (daily_token_limit >= 0),
    monthly_token_limit bigint check (monthly_token_limit >= 0),
    concurrency integer check (concurrency >= 0),
    features text[] not null default '{}',
    allowed_models text[],
    environment_factors jsonb not null default '{"staging": 1, "development": 1}'
        check (jsonb_typeof(environment_factors) = 'object'),
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
comment on table public.plans is 'What a subscription allows; null is unlimited, zero refuses all. "free" and "pay-as-you-go" apply without a subscription.';
insert into public.plans (slug, name, description, daily_request_limit, monthly_request_limit, daily_token_limit, monthly_token_limit)
values ('free', 'Free', 'What an account without a plan and without bought or granted credits may use.', 100, 1000, 10000, 100000),
       ('pay-as-you-go', 'Pay as you go', 'Prepaid credits without a plan: rate limits only.', null, null, null, null);
alter table public.plans enable row level security;
revoke all on public.plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.plans to service_role;
revoke all on sequence public.plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.plans_id_seq to service_role;

create table public.user_plans (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    plan_id bigint not null references public.plans (id),
    start_date timestamptz not null,
    end_date timestamptz not null,
    is_active boolean not null default true,
    created_at timestamptz not null default now(),
    constraint user_plans_in_order check (start_date < end_date)
);
create unique index user_plans_one_active on public.user_plans (user_id) where is_active;
comment on index public.user_plans_one_active is 'A user has one plan at a time; the others are history.';
create index user_plans_plan_idx on public.user_plans (plan_id);
create index user_plans_user_idx on public.user_plans (user_id);
alter table public.user_plans enable row level security;
revoke all on public.user_plans from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.user_plans to service_role;
revoke all on sequence public.user_plans_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.user_plans_id_seq to service_role;

create table public.rate_limit_configs (
    subject text not null check (subject in ('default', 'user', 'key')),
    subject_id bigint not null,
    requests_per_minute bigint check (requests_per_minute >= 0),
    requests_per_hour bigint check (requests_per_hour >= 0),
    requests_per_day bigint check (requests_per_day >= 0),
    tokens_per_minute bigint check (tokens_per_minute >= 0),
    tokens_per_hour bigint check (tokens_per_hour >= 0),
    tokens_per_day bigint check (tokens_per_day >= 0),
    concurrency integer check (concurrency >= 0),
    burst bigint check (burst >= 0),
    updated_at timestamptz not null default now(),
    primary key (subject, subject_id)
);
comment on table public.rate_limit_configs is
    'Limits of a user or a key; null is unlimited, zero refuses all. A user without a row has the default''s; a key without one has only its user''s.';
insert into public.rate_limit_configs (subject, subject_id, requests_per_minute, requests_per_hour, requests_per_day,
                                       tokens_per_minute, tokens_per_hour, tokens_per_day)
values ('default', 0, 60, 1000, 10000, 10000, 100000, 1000000);
alter table public.rate_limit_configs enable row level security;
revoke all on public.rate_limit_configs from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.rate_limit_configs to service_role;
